"""`python -m budwood`: runs the `budwood` command in this Python."""

from budwood.cli.app import main

if __name__ == "__main__":
    main()

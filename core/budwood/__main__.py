"""`python -m budwood`: the command `budwood`, of this Python."""

from budwood.cli.app import main

if __name__ == "__main__":
    main()

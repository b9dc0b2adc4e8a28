"""`python -m budwood`: runs the `budwood` command in this Python, and as the command does.

Python would look for modules in the working folder first, and libraries take a base's folder there, such as `hqq`, for
an installed library.
"""

import contextlib
import os
import sys

with contextlib.suppress(OSError):  # the working folder may be gone
    if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
        del sys.path[0]

from budwood.cli.app import main

if __name__ == "__main__":
    main()

"""`python -m bokbok_trio` is the command `bokbok`."""

import sys

from ._cli import main

if __name__ == "__main__":
    sys.exit(main())

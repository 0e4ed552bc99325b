"""`python -m mmmamba`: see `mmmamba.cli`."""

import sys

from mmmamba.cli import main

if __name__ == "__main__":
    sys.exit(main())

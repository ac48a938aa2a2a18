"""`python -m vit_dist` is the command `vit-dist`."""

import sys

from vit_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())

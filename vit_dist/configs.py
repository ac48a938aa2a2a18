"""The recipes: `from vit_dist.configs import digits`, in a checkout (its top-level folder) and where this is installed.

`__path__` makes this module a package, so that recipes can be imported from that folder.
"""

from pathlib import Path

INSTALLED, CHECKOUT = Path(__file__).with_suffix(""), Path(__file__).parents[1] / "configs"
FOLDER = INSTALLED if INSTALLED.is_dir() else CHECKOUT
__path__ = [str(FOLDER)]

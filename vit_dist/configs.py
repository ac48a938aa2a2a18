"""The recipes: `from vit_dist.configs import digits`, in a checkout (its top-level folder) and where this is installed.

A module that says where its submodules lie is a package to Python.
"""

from pathlib import Path

INSTALLED, CHECKOUT = Path(__file__).with_suffix(""), Path(__file__).parents[1] / "configs"
FOLDER = INSTALLED if INSTALLED.is_dir() else CHECKOUT
__path__ = [str(FOLDER)]

"""The layout `<split>/<class>/<image>`, in folders on a disk or inside a tar.

Holds the names of splits, the test for image files, and the note about entries that are left out.
"""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.data.files import entries
from vit_dist.data.sets.index import Index
from vit_dist.escape import printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
KNOWN_SPLITS = ("train", "test", "val", "validation")
MOST_CLASSES = 1_000_000  # a label beyond is not the number of a class
_SPLIT_NAMES = {
    "train": ("train",),
    "test": ("test", "val", "validation"),
    "val": ("val", "validation", "test"),
    "validation": ("validation", "val", "test"),
}


class NoSplit(ConfigError):
    """The set can be read but has no split of that name."""


def check_filled(where: object, index: Index) -> Index:
    """Returns the index. Raises `ConfigError` if it has no class, or one without images."""
    if not index.class_names:
        raise ConfigError(f"{where}: no class folders in it; expected <class>/<image>")
    for name, count in zip(index.class_names, np.bincount(index.labels, minlength=len(index.class_names))):
        if not count:
            raise ConfigError(f"{where}: class folder {name!r} holds no images; fill or remove it")
    return index


def class_folders(folder: Path) -> tuple[str, ...]:
    """Returns the names of the class folders in a split's folder, sorted."""
    return tuple(name for name, is_folder in entries(folder) if is_folder and not is_hidden(name))


def split_names(split: str) -> tuple[str, ...]:
    """Returns the names that a split may have in a set, its own first: `test` and `val` stand for each other."""
    return _SPLIT_NAMES.get(split, (split,))


def find_split(split: str, available: Collection[str]) -> str | None:
    """Returns the first of `split_names` that is available."""
    return next((name for name in split_names(split) if name in available), None)


def required_split(split: str, available: Collection[str]) -> str:
    """Returns the first of `split_names` that is available. Raises `ConfigError` if none is."""
    name = find_split(split, available)
    if name is None:
        raise NoSplit(f"no split {split!r}: this source has {' and '.join(available)}")
    return name


def split_word(name: str, known: Collection[str]) -> str | None:
    """Returns the last word of a file name that is a known split: `train` for `train-0001` and `train0001`."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    splits = [form for word in words for form in (word.rstrip("0123456789"), word) if form in known]
    return splits[-1] if splits else None


def is_hidden(name: str) -> bool:
    """Returns whether an entry is hidden: `.DS_Store`, or `._cat.jpg` and `__MACOSX`, which macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    return not is_hidden(name) and name.lower().endswith(IMAGE_SUFFIXES)


def left_out(where: object, names: Iterable[str], what: str = "entries that are not <class>/<image>") -> list[str]:
    """Returns an index's note about entries that were left out: how many and the first three; [] if there are none."""
    ordered = sorted(names)
    if not ordered:
        return []
    shown = ", ".join(ordered[:3]) + (", ..." if len(ordered) > 3 else "")
    return [printable(f"{where}: left out {len(ordered)} {what} ({shown})")]

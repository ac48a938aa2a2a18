"""How images lie in folders, be it on a disk or inside a tar: `<split>/<class>/<image>`.

The names that splits go by, which entries are images, and what is said of the rest: it is left out and counted.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from vit_dist.config import ConfigError
from vit_dist.data.files import entries, printable

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
KNOWN_SPLITS = ("train", "test", "val", "validation")
MOST_CLASSES = 1_000_000  # a label beyond is no number of a class
_SAME_SPLIT = {
    "train": ("train",),
    "test": ("test", "val", "validation"),
    "val": ("val", "validation", "test"),
    "validation": ("validation", "val", "test"),
}


class NoSplit(ConfigError):
    """The source is sound, but has no split of that name."""


def check_filled(where: object, classes: Mapping[str, Collection[object]]) -> None:
    """Raises `ConfigError` where there is no class, or one without images."""
    if not classes:
        raise ConfigError(f"{where}: no class folders in it; expected <class>/<image>")
    for name, images in classes.items():
        if not images:
            raise ConfigError(f"{where}: class folder {name!r} holds no images; fill or remove it")


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of the class folders of a split's folder, sorted."""
    return tuple(name for name, is_folder in entries(folder) if is_folder and not is_hidden(name))


def split_names(split: str) -> tuple[str, ...]:
    """The names a split may be found under, its own first: `test` and `val` stand for each other."""
    return _SAME_SPLIT.get(split, (split,))


def find_split(split: str, found: Collection[str]) -> str | None:
    """The first of `split_names` that is among those found."""
    return next((name for name in split_names(split) if name in found), None)


def split_word(name: str, known: Collection[str]) -> str | None:
    """The last word of a file's name that is one of these splits; `train-0001` and `train0001` are both `train`."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    found = [form for word in words for form in (word.rstrip("0123456789"), word) if form in known]
    return found[-1] if found else None


def is_hidden(name: str) -> bool:
    """Such as `.DS_Store`, and `._cat.jpg` and `__MACOSX`, which macOS puts into its archives."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    return not is_hidden(name) and name.lower().endswith(IMAGE_SUFFIXES)


def left_out(where: object, names: Iterable[str], what: str = "entries that are no <class>/<image>") -> list[str]:
    """What an index is to note of all that was found and not taken: how many, and the first of them."""
    some = sorted(names)
    if not some:
        return []
    shown = ", ".join(some[:3]) + (", ..." if len(some) > 3 else "")
    return [printable(f"{where}: left out {len(some)} {what} ({shown})")]

"""How images lie in folders, be it on a disk or inside a tar: `<split>/<class>/<image>`.

The names that splits go by, which entries are images, and what is said of the rest: it is left out, counted and logged.
"""

import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from vit_dist.config import ConfigError
from vit_dist.data.files import entries

_log = logging.getLogger(__name__)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
KNOWN_SPLITS = ("train", "test", "val", "validation")
_SAME_SPLIT = {
    "train": ("train",),
    "test": ("test", "val", "validation"),
    "val": ("val", "validation", "test"),
    "validation": ("validation", "val", "test"),
}


class NoSplit(ConfigError):
    """The source is sound, but has no split of that name."""


def check_classes(where: object, classes: Mapping[str, Collection[object]]) -> None:
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


def is_hidden(name: str) -> bool:
    """Such as `.DS_Store`, and `._cat.jpg` and `__MACOSX`, which macOS puts into its archives."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    return not is_hidden(name) and name.lower().endswith(IMAGE_SUFFIXES)


def report_ignored(where: object, ignored: Iterable[str]) -> None:
    """Says once, with a count and the first names, what was found and not taken."""
    names = sorted(ignored)
    if names:
        _log.warning(
            "%s: left out %d entries that are no <class>/<image> (%s)",
            where,
            len(names),
            ", ".join(names[:3]) + (", ..." if len(names) > 3 else ""),
        )

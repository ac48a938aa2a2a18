"""How images lie in folders, be it on a disk or inside a tar: `<split>/<class>/<image>`.

A `Listing` is the images of one split in class-then-name order, which is what gives an example its id, whatever the
container. What does not fit the pattern is left out, counted and logged.
"""

import dataclasses
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import numpy as np

from vit_dist.config import ConfigError

_log = logging.getLogger(__name__)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")
KNOWN_SPLITS = ("train", "test", "val", "validation")
_SAME_SPLIT = {
    "train": ("train",),
    "test": ("test", "val", "validation"),
    "val": ("val", "validation", "test"),
    "validation": ("validation", "val", "test"),
}


@dataclasses.dataclass(frozen=True)
class Listing:
    """The images of one split. `names` are `class/file`, in order; `labels` `int32 [N]` index `class_names`."""

    class_names: tuple[str, ...]
    names: tuple[str, ...]
    labels: np.ndarray

    def with_classes(self, class_names: tuple[str, ...], where: object) -> "Listing":
        """The same images, labelled by the training split's classes. Raises `ConfigError` for a class it lacks."""
        unknown = [name for name in self.class_names if name not in class_names]
        if unknown:
            raise ConfigError(f"{where}: class {unknown[0]!r} is not among the {len(class_names)} of the train split")
        missing = [name for name in class_names if name not in self.class_names]
        if missing:
            _log.warning("%s: no images of %d classes of the train split, such as %r", where, len(missing), missing[0])
        numbers = np.array([class_names.index(name) for name in self.class_names], np.int32)
        return Listing(class_names, self.names, numbers[self.labels])


def list_images(where: object, classes: Mapping[str, Collection[str]]) -> Listing:
    """Sorts image names by class. Raises `ConfigError` where there is no class, or one without images."""
    if not classes:
        raise ConfigError(f"{where}: no class folders in it; expected <class>/<image>")
    for name, images in classes.items():
        if not images:
            raise ConfigError(f"{where}: class folder {name!r} holds no images; fill or remove it")
    class_names = tuple(sorted(classes))
    counts = [len(classes[name]) for name in class_names]
    return Listing(
        class_names,
        tuple(f"{name}/{image}" for name in class_names for image in sorted(classes[name])),
        np.repeat(np.arange(len(counts), dtype=np.int32), counts),
    )


def list_folder(folder: Path) -> Listing:
    """The images below `folder/<class>/`. Raises as `list_images`."""
    classes: dict[str, list[str]] = {}
    ignored = [entry.name for entry in os.scandir(folder) if is_hidden(entry.name) or not entry.is_dir()]
    for name in class_folders(folder):
        entries = list(os.scandir(folder / name))
        classes[name] = [entry.name for entry in entries if is_image(entry.name) and entry.is_file()]
        if len(classes[name]) != len(entries):
            ignored += [f"{name}/{entry.name}" for entry in entries if not (is_image(entry.name) and entry.is_file())]
    report_ignored(folder, ignored)
    return list_images(folder, classes)


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of the class folders of a split's folder, sorted."""
    return tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not is_hidden(entry.name)))


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

"""Takes a subset of a data set: some of its classes, or a fraction of each class's examples.

Which examples a fraction keeps depends only on the class's name and size, not on the run. So runs with different seeds
train on the same examples, and those of fraction 0.1 are among those of fraction 0.2.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.data.sets.examples import ArraySource, Images, Source
from vit_dist.data.sets.index import check_distinct
from vit_dist.data.shuffle import example_ids
from vit_dist.schema import near_miss


@dataclasses.dataclass(frozen=True)
class ChosenImages:
    """Some of the images of another source: image `i` is its image `ids[i]`, `int64 [N]`."""

    images: Images
    ids: np.ndarray

    def read(self, index: int) -> bytes:
        return self.images.read(int(self.ids[index]))


def subset(source: Source, classes: Sequence[str] = (), fraction: float = 1.0) -> Source:
    """Takes the examples of some classes, and a fraction of each class.

    Args:
      source: the set to take from.
      classes: the classes to keep; empty for all.
      fraction: of each class's examples, in (0, 1]; their number is rounded up.

    Returns:
      The chosen examples in the same order, with new ids from 0. Labels are indices into `classes`, if given.

    Raises:
      ConfigError: for a class that the source lacks.
    """
    if classes:
        source = _choose_classes(source, tuple(classes))
    return take(source, _fraction_ids(source, fraction)) if fraction < 1 else source


def check_classes(classes: Sequence[str], known: Sequence[str]) -> None:
    """Raises `ConfigError` if `data.classes` lists a class twice, or one that is not in `known`."""
    for number, name in enumerate(classes):
        if name not in known:
            close = near_miss(name, known)
            raise ConfigError(f"data.classes: {name!r} is not among the data's {len(known)} classes{close}")
        if name in classes[:number]:
            raise ConfigError(f"data.classes: {name!r} is listed twice; list each class once")


def _choose_classes(source: Source, classes: tuple[str, ...]) -> Source:
    check_classes(classes, source.class_names)
    labels = new_labels(source, classes)
    chosen = np.flatnonzero(labels >= 0)
    if not len(chosen):
        raise ConfigError(f"data.classes: the split has no examples of {', '.join(classes[:3])}; choose others")
    return dataclasses.replace(take(source, chosen), labels=labels[chosen], class_names=classes)


def new_labels(source: Source, class_names: Sequence[str]) -> np.ndarray:
    """Returns the source's labels as indices into `class_names`, `int32 [N]`; -1 for a class that is not in it.

    Raises `ConfigError` if two classes of the source share a name.
    """
    check_distinct(source.class_names, "data.path")
    numbers = {name: number for number, name in enumerate(class_names)}
    table = np.array([*(numbers.get(name, -1) for name in source.class_names), -1], np.int32)
    valid = (source.labels >= 0) & (source.labels < len(source.class_names))
    return table[np.where(valid, source.labels, -1)]


def _fraction_ids(source: Source, fraction: float) -> np.ndarray:
    """Returns the ids, ascending, of `fraction` of each class, and of invalid labels, which `check_labels` reports."""
    chosen = (source.labels < 0) | (source.labels >= len(source.class_names))
    by_class = np.argsort(source.labels, kind="stable")
    ends = np.searchsorted(source.labels[by_class], np.arange(len(source.class_names) + 1))
    for name, start, end in zip(source.class_names, ends, ends[1:]):
        size = int(end - start)
        if size:
            keep = math.ceil(Fraction(str(fraction)) * size)  # exact: in floats, 0.07 of 100 is more than 7
            digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            ranks = example_ids(int.from_bytes(digest, "big"), size, np.arange(keep))
            chosen[by_class[start + ranks]] = True
    return np.flatnonzero(chosen)


def take(source: Source, ids: np.ndarray) -> Source:
    """Returns the examples `ids`, `int64 [n]`, of a source. Copies pixels, but not files."""
    labels = source.labels[ids]
    if isinstance(source, ArraySource):
        return dataclasses.replace(source, images=source.images[ids], labels=labels)
    images = ChosenImages(source.images, ids)
    return dataclasses.replace(source, names=source.names.take(ids), labels=labels, images=images)

"""A part of a data set: some of its classes, or a share of each class's examples.

Which examples a share keeps belongs to the set, not to the run: it depends on nothing but the class's name and how many
examples it has. So runs with different seeds learn from the same tenth, and that tenth lies within the fifth.
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
from vit_dist.data.shuffle import permutation
from vit_dist.schema import near_miss


@dataclasses.dataclass(frozen=True)
class ChosenImages:
    """Some of the images of another source: image `i` is its image `numbers[i]`, `int64 [N]`."""

    images: Images
    numbers: np.ndarray

    def read(self, index: int) -> bytes:
        return self.images.read(int(self.numbers[index]))


def subset(source: Source, classes: Sequence[str] = (), fraction: float = 1.0) -> Source:
    """The examples of `classes` (none: of all), and of each class `fraction` of them, rounded up.

    They keep their order, and their ids are anew their places in it. Labels are places in `classes`. Raises
    `ConfigError` for a class that the source lacks.
    """
    if classes:
        source = _of_classes(source, tuple(classes))
    return _take(source, _share(source, fraction)) if fraction < 1 else source


def check_classes(classes: Sequence[str], known: Sequence[str]) -> None:
    """Raises `ConfigError` where `data.classes` names a class twice, or one that is not among those known."""
    for number, name in enumerate(classes):
        if name not in known:
            close = near_miss(name, known)
            raise ConfigError(f"data.classes: {name!r} is not among the data's {len(known)} classes{close}")
        if name in classes[:number]:
            raise ConfigError(f"data.classes: {name!r} stands in it twice; name each class once")


def _of_classes(source: Source, classes: tuple[str, ...]) -> Source:
    check_classes(classes, source.class_names)
    labels = new_labels(source, classes)
    chosen = np.flatnonzero(labels >= 0)
    if not len(chosen):
        raise ConfigError(f"data.classes: the split has no examples of {', '.join(classes[:3])}; choose others")
    return dataclasses.replace(_take(source, chosen), labels=labels[chosen], class_names=classes)


def new_labels(source: Source, class_names: Sequence[str]) -> np.ndarray:
    """The source's labels as places in `class_names`, `int32 [N]`; -1 for a class that is not in it.

    Raises `ConfigError` where two classes of the source have one name.
    """
    check_distinct(source.class_names, "data.path")
    numbers = {name: number for number, name in enumerate(class_names)}
    table = np.array([*(numbers.get(name, -1) for name in source.class_names), -1], np.int32)
    known = (source.labels >= 0) & (source.labels < len(source.class_names))
    return table[np.where(known, source.labels, -1)]


def _share(source: Source, fraction: float) -> np.ndarray:
    """The ids, ascending, of `fraction` of each class; of what has no valid label all, to be complained of later."""
    chosen = (source.labels < 0) | (source.labels >= len(source.class_names))
    by_class = np.argsort(source.labels, kind="stable")
    ends = np.searchsorted(source.labels[by_class], np.arange(len(source.class_names) + 1))
    for name, start, end in zip(source.class_names, ends, ends[1:]):
        size = int(end - start)
        if size:
            keep = math.ceil(Fraction(str(fraction)) * size)  # as written: 0.07 of 100, as floats, is more than 7
            digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
            ranks = permutation(int.from_bytes(digest, "big"), 0, size, np.arange(keep))
            chosen[by_class[start + ranks]] = True
    return np.flatnonzero(chosen)


def _take(source: Source, ids: np.ndarray) -> Source:
    """The examples `ids`, `int64 [n]`, of a source; of pixels a copy, of files only where they lie."""
    labels = source.labels[ids]
    if isinstance(source, ArraySource):
        return dataclasses.replace(source, images=source.images[ids], labels=labels)
    images = ChosenImages(source.images, ids)
    return dataclasses.replace(source, names=source.names.take(ids), labels=labels, images=images)

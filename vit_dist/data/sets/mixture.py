"""Several sets as one to train on (`data.mixture`): laid end to end, their classes joined by name.

The parts keep their order, so that an id is its example's place in its own set plus the sizes of the sets before. How
often each is seen is no business of this module: weights travel on the source, and `order.py` heeds them.
"""

import bisect
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Sequence

import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.sets.examples import ArraySource, FileSource, Images, Source
from vit_dist.data.sets.index import Names
from vit_dist.data.sets.subset import check_classes, new_labels, subset

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class JoinedImages:
    """The images of several sources, end to end; those of source `k` begin at `starts[k]`."""

    sources: tuple[Images, ...]
    starts: tuple[int, ...]

    def read(self, index: int) -> bytes:
        number = bisect.bisect_right(self.starts, index) - 1
        return self.sources[number].read(index - self.starts[number])


def open_mixture(data: config.Data, split: str, open_one: Callable[[config.Data, str], Source]) -> Source:
    """The mixture's train split; or another split of `data.source`, labelled by the classes of the mixture.

    `open_one` opens a split of the one set that a config names. The classes are those of the parts' train splits: as
    they are where all parts have the same, else each name once, sorted; or `data.classes`. `data.fraction` is taken of
    each part. Raises `ConfigError` for what cannot be joined, and as `open_one`, naming the part.
    """
    weights = _weights(data.mixture)
    plain = dataclasses.replace(data, mixture=(), classes=(), fraction=1.0)
    parts = [_open_part(plain, number, part, open_one) for number, part in enumerate(data.mixture)]
    class_names = _class_names(parts)
    check_classes(data.classes, class_names)
    if split != "train":
        return _evaluated(open_one(plain, split), data.classes, class_names)
    for number, part in enumerate(parts):
        part = subset(_of_classes(part, data.classes, f"data.mixture[{number}]"), fraction=data.fraction)
        parts[number] = _labelled(part, data.classes or class_names)
    return _join(parts, weights, int(data.memory_limit_gb * 2**30))


def _weights(mixture: Sequence[config.MixtureSource]) -> tuple[float, ...]:
    """The weights of all parts, or none. Raises `ConfigError`."""
    given = [part.weight for part in mixture if part.weight is not None]
    for number, part in enumerate(mixture):
        if given and part.weight is None:
            raise ConfigError(f"data.mixture[{number}].weight: not set, but others are; give every part one, or none")
        if part.weight is not None and not 0 < part.weight < math.inf:
            raise ConfigError(f"data.mixture[{number}].weight: must be above 0 and finite, found {part.weight:g}")
    return tuple(given)


def _open_part(
    data: config.Data, number: int, part: config.MixtureSource, open_one: Callable[[config.Data, str], Source]
) -> Source:
    try:
        return open_one(dataclasses.replace(data, source=part.source, path=part.path), "train")
    except ConfigError as error:
        raise ConfigError(f"data.mixture[{number}]: {error}") from error


def _class_names(parts: Sequence[Source]) -> tuple[str, ...]:
    if all(part.class_names == parts[0].class_names for part in parts):
        return parts[0].class_names
    return tuple(sorted({name for part in parts for name in part.class_names}))


def _evaluated(source: Source, classes: tuple[str, ...], class_names: tuple[str, ...]) -> Source:
    """A split to evaluate on, of which `classes` are kept; it may have fewer than the mixture, but no others."""
    unknown = [name for name in source.class_names if name not in class_names]
    if unknown and not classes:
        raise ConfigError(
            f"data.path: class {unknown[0]!r} is none of the {len(class_names)} of data.mixture; what is evaluated on "
            "comes from data.source and data.path, and must have classes that are trained on"
        )
    source = _of_classes(source, classes, "data.path")
    missing = [name for name in classes or class_names if name not in source.class_names]
    if missing:
        _log.warning("no images to evaluate on of %d classes of data.mixture, such as %r", len(missing), missing[0])
    return _labelled(source, classes or class_names)


def _of_classes(source: Source, classes: tuple[str, ...], key: str) -> Source:
    """What the source has of `data.classes`, if any are chosen."""
    own = tuple(name for name in classes if name in source.class_names)
    if classes and not own:
        raise ConfigError(f"{key}: has none of data.classes, such as {classes[0]!r}; choose others or leave it out")
    return subset(source, own)


def _labelled(source: Source, class_names: tuple[str, ...]) -> Source:
    """The same examples; labels are places in `class_names`, which hold all classes of the source."""
    if source.class_names == class_names:
        return source
    return dataclasses.replace(source, labels=new_labels(source, class_names), class_names=class_names)


def _join(parts: Sequence[Source], weights: tuple[float, ...], limit: int) -> Source:
    for number, part in enumerate(parts):
        if not len(part):
            raise ConfigError(f"data.mixture[{number}]: holds no examples; leave it out")
    labels = np.concatenate([part.labels for part in parts])
    shares = tuple(zip(map(len, parts), weights)) if weights else ()
    files = [part for part in parts if isinstance(part, FileSource)]
    arrays = [part for part in parts if isinstance(part, ArraySource)]
    if files and arrays:
        kinds = [
            next(k for k, part in enumerate(parts) if isinstance(part, kind)) for kind in (FileSource, ArraySource)
        ]
        raise ConfigError(
            f"data.mixture: part {kinds[0]} is image files, part {kinds[1]} an array of pixels; make the array into "
            "files of their own with `vit-dist prepare`, and name those"
        )
    if arrays:
        return ArraySource(_pixels(arrays, limit), labels, parts[0].class_names, shares, "train")
    where, prefixes = _prefixes([part.where for part in files])
    names = Names.of(prefix + name for prefix, part in zip(prefixes, files) for name in part.names)
    starts = (0, *itertools.accumulate(map(len, files[:-1])))
    images = JoinedImages(tuple(part.images for part in files), starts)
    versions = [part.version for part in files]
    version = "\n".join(versions) if any(versions) else ""
    return FileSource(where, names, labels, parts[0].class_names, images, version, shares, "train")


def _pixels(arrays: Sequence[ArraySource], limit: int) -> np.ndarray:
    shapes = [part.images.shape[1:] for part in arrays]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ConfigError(
                f"data.mixture[{number}]: images of {'x'.join(map(str, shape))}, but those of part 0 are "
                f"{'x'.join(map(str, shapes[0]))}; make each set into files with `vit-dist prepare`, and name those"
            )
    size = sum(part.images.nbytes for part in arrays)
    if size > limit:
        raise ConfigError(
            f"data.mixture: takes {size / 2**30:.3g} GiB as pixels, more than data.memory_limit_gb={limit / 2**30:g}; "
            "raise it, or make each set into files with `vit-dist prepare`"
        )
    return np.concatenate([part.images for part in arrays])


def _prefixes(places: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that all places lie below, and the rest of each; ("", whole places) where there is none.

    So a mixture that is moved as a whole keeps its names, and with them its fingerprint.
    """
    paths = [place.split("/") for place in places]
    common = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*paths))]
    if not any(common):
        common = []
    return "/".join(common), ["".join(f"{name}/" for name in path[len(common) :]) for path in paths]

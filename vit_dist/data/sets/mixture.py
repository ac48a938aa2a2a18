"""Joins several sets into one to train on (`data.mixture`): end to end, with their classes matched by name.

The sources keep their order, so an example's id is its id in its own source plus the sizes of the sources before it.
How often each source is seen is not decided here: the weights travel in `Source.mixture`, and `order.py` applies them.
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
    """The images of several sources, end to end; those of source `k` begin at index `starts[k]`."""

    images: tuple[Images, ...]
    starts: tuple[int, ...]

    def read(self, index: int) -> bytes:
        source = bisect.bisect_right(self.starts, index) - 1
        return self.images[source].read(index - self.starts[source])


def open_mixture(data: config.Data, split: str, open_set: Callable[[config.Data, str], Source]) -> Source:
    """Opens a split of `data.mixture`.

    Args:
      data: `fraction` and `classes` apply to each source.
      split: `train` is the mixture; any other split is that of `data.source` and `data.path`.
      open_set: opens a split of the single set that a config names.

    Returns:
      The split. Its labels are indices into the classes of the mixture: `data.classes` if set, else the sources' common
      list if all have the same, else the union of their class names, sorted.

    Raises:
      ConfigError: if the sources cannot be joined or one cannot be opened; names the source.
    """
    weights = _weights(data.mixture)
    plain = dataclasses.replace(data, mixture=(), classes=(), fraction=1.0)
    sources: list[Source] = []
    for number, member in enumerate(data.mixture):
        try:
            sources.append(open_set(dataclasses.replace(plain, source=member.source, path=member.path), "train"))
        except ConfigError as error:
            raise ConfigError(f"data.mixture[{number}]: {error}") from error
    class_names = _class_names(sources)
    check_classes(data.classes, class_names)
    if split != "train":
        return _evaluation_source(open_set(plain, split), data.classes, class_names)
    for number, source in enumerate(sources):
        source = subset(_choose(source, data.classes, f"data.mixture[{number}]"), fraction=data.fraction)
        sources[number] = _relabel(source, data.classes or class_names)
    return _join(sources, weights, int(data.memory_limit_gb * 2**30))


def _weights(mixture: Sequence[config.MixtureSource]) -> tuple[float, ...]:
    """Returns the weights of all sources, or () if none is set. Raises `ConfigError` if only some are."""
    weights = [source.weight for source in mixture if source.weight is not None]
    for number, source in enumerate(mixture):
        if weights and source.weight is None:
            raise ConfigError(f"data.mixture[{number}].weight: not set, but others are; give every source one, or none")
        if source.weight is not None and not 0 < source.weight < math.inf:
            raise ConfigError(f"data.mixture[{number}].weight: must be above 0 and finite, found {source.weight:g}")
    return tuple(weights)


def _class_names(sources: Sequence[Source]) -> tuple[str, ...]:
    if all(source.class_names == sources[0].class_names for source in sources):
        return sources[0].class_names
    return tuple(sorted({name for source in sources for name in source.class_names}))


def _evaluation_source(source: Source, classes: tuple[str, ...], class_names: tuple[str, ...]) -> Source:
    """Returns the examples of `classes` in an evaluation split, which may lack classes of the mixture but add none."""
    unknown = [name for name in source.class_names if name not in class_names]
    if unknown and not classes:
        raise ConfigError(
            f"data.path: class {unknown[0]!r} is none of the {len(class_names)} of data.mixture; the evaluation split "
            "(data.source, data.path) may only have classes of the mixture"
        )
    source = _choose(source, classes, "data.path")
    missing = [name for name in classes or class_names if name not in source.class_names]
    if missing:
        _log.warning(
            "no images of %d classes of data.mixture in the evaluation split, such as %r", len(missing), missing[0]
        )
    return _relabel(source, classes or class_names)


def _choose(source: Source, classes: tuple[str, ...], key: str) -> Source:
    """Returns the examples of `classes` (empty: all). Raises `ConfigError` if the source has none of them."""
    own = tuple(name for name in classes if name in source.class_names)
    if classes and not own:
        raise ConfigError(f"{key}: has none of data.classes, such as {classes[0]!r}; choose others or leave it out")
    return subset(source, own)


def _relabel(source: Source, class_names: tuple[str, ...]) -> Source:
    """Returns the same examples with labels that are indices into `class_names`, which hold all its classes."""
    if source.class_names == class_names:
        return source
    return dataclasses.replace(source, labels=new_labels(source, class_names), class_names=class_names)


def _join(sources: Sequence[Source], weights: tuple[float, ...], limit: int) -> Source:
    for number, source in enumerate(sources):
        if not len(source):
            raise ConfigError(f"data.mixture[{number}]: holds no examples; leave it out")
    labels = np.concatenate([source.labels for source in sources])
    mixture = tuple(zip(map(len, sources), weights))  # () without weights
    files = [source for source in sources if isinstance(source, FileSource)]
    arrays = [source for source in sources if isinstance(source, ArraySource)]
    if files and arrays:
        raise ConfigError(
            f"data.mixture: source {sources.index(files[0])} has image files, source {sources.index(arrays[0])} "
            "pixels; convert the pixels with `vit-dist prepare` and use its DEST"
        )
    if arrays:
        return ArraySource(_pixels(arrays, limit), labels, sources[0].class_names, mixture, "train")
    folder, prefixes = _common_folder([source.where for source in files])
    names = Names.of(prefix + name for prefix, source in zip(prefixes, files) for name in source.names)
    starts = (0, *itertools.accumulate(map(len, files[:-1])))
    images = JoinedImages(tuple(source.images for source in files), starts)
    versions = [source.version for source in files]
    version = "\n".join(versions) if any(versions) else ""
    return FileSource(folder, names, labels, sources[0].class_names, images, version, mixture, "train")


def _pixels(arrays: Sequence[ArraySource], limit: int) -> np.ndarray:
    shapes = [source.images.shape[1:] for source in arrays]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise ConfigError(
                f"data.mixture[{number}]: images of {'x'.join(map(str, shape))}, but those of source 0 are "
                f"{'x'.join(map(str, shapes[0]))}; make each set into files with `vit-dist prepare`, and name those"
            )
    size = sum(source.images.nbytes for source in arrays)
    if size > limit:
        raise ConfigError(
            f"data.mixture: takes {size / 2**30:.3g} GiB as pixels, more than data.memory_limit_gb={limit / 2**30:g}; "
            "raise it, or make each set into files with `vit-dist prepare`"
        )
    return np.concatenate([source.images for source in arrays])


def _common_folder(paths: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the deepest folder that holds all paths, and each path relative to it; ("", full paths) if none does.

    A mixture whose sources move together therefore keeps its names, and with them its fingerprint.
    """
    split_paths = [path.split("/") for path in paths]
    common = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*split_paths))]
    if not any(common):
        common = []
    return "/".join(common), ["".join(f"{name}/" for name in path[len(common) :]) for path in split_paths]

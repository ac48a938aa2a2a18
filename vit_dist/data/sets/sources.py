"""Opens a data set: the table of containers, and `open_source`.

A container (a key of `SOURCES`, for `data.source`) is how a set is stored; its module lists the examples. A `Source` is
one split of a set, opened. What follows is the same for every container and happens here: choosing classes or a
fraction, joining a mixture of several sources, decoding into memory.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.files import location
from vit_dist.data.pictures.images import CHANNELS
from vit_dist.data.sets.examples import FileSource, Source
from vit_dist.data.sets.formats import array_record, arrays, folder, idx, imagenet_tar, parquet, tar, tfds, webdataset
from vit_dist.data.sets.in_memory import decode_all
from vit_dist.data.sets.mixture import open_mixture
from vit_dist.data.sets.subset import subset
from vit_dist.escape import printable
from vit_dist.schema import one_of

# `data.source` -> the function that opens a split of it: `open_split(path, split, data)`.
SOURCES: dict[str, Callable[[Path, str, config.Data], Source]] = {
    "digits": idx.open_digits,
    "idx": idx.open_split,
    "folder": folder.open_split,
    "tar": tar.open_split,
    "imagenet_tar": imagenet_tar.open_split,
    "webdataset": webdataset.open_split,
    "parquet": parquet.open_split,
    "npz": arrays.open_split,
    "tfds": tfds.open_split,
    "array_record": array_record.open_split,
}
_PIXEL_SOURCES = ("digits", "idx", "npz")  # their examples are arrays, not files


def open_source(data: config.Data, split: str, channels: int = 3) -> Source:
    """Opens a split of the data that the config names.

    Args:
      data: `mixture` and `fraction` apply to the split `train` only, `classes` to every split.
      split: `train`, `test`, `val` or another name that the set uses.
      channels: 1 or 3; `data.in_memory` decodes files to it.

    Returns:
      The examples, as pixels or as files.

    Raises:
      ConfigError: for an unknown source; a missing path, split or library; an unknown or empty class; damaged files;
        classes that differ between splits; sets that do not mix; too little memory.
    """
    _check_idx_keys(data)
    if data.mixture:
        source = open_mixture(data, split, _open_set)
    else:
        source = subset(_open_set(data, split), data.classes, data.fraction if split == "train" else 1.0)
    if isinstance(source, FileSource):
        if channels not in CHANNELS:
            raise ConfigError(f"model.channels: {channels}, but image files are decoded to 1 or 3")
        if data.in_memory:
            return decode_all(source, channels, int(data.memory_limit_gb * 2**30), data.threads)
    return source


def is_in_memory(data: config.Data) -> bool:
    """Returns whether `open_source` would return pixels (an `ArraySource`), without opening anything."""
    names = [source.source for source in data.mixture] or [data.source]
    return data.in_memory or all(name in _PIXEL_SOURCES for name in names)


def _check_idx_keys(data: config.Data) -> None:
    """Raises `ConfigError` if keys that only `idx` sets use are set and no `idx` set is read."""
    if "idx" in (data.source, *(source.source for source in data.mixture)):
        return
    for key, unset in (("name", "null"), ("download", "false")):
        if value := getattr(data, key):
            raise ConfigError(
                f"data.{key}: {str(value).lower()}, which only data.source=idx uses, found {data.source}; "
                f"set data.{key}={unset}"
            )


def _open_set(data: config.Data, split: str) -> Source:
    """Opens a split of the set that `data.source` and `data.path` name, with all its examples.

    Names of classes may come from folders, whose names are bytes; from here on they are texts that can be printed.
    """
    source = _open_container(data, split)
    return dataclasses.replace(source, class_names=tuple(map(printable, source.class_names)))


def _open_container(data: config.Data, split: str) -> Source:
    open_split = SOURCES[one_of("data.source", data.source, SOURCES)]
    if data.source == "digits":  # it comes with scikit-learn
        if data.path is not None:
            raise ConfigError(
                f"data.path: {data.path}, but data.source={data.source} reads no files; leave one out, or set both"
            )
        return open_split(Path(), split, data)
    if data.path is None:
        raise ConfigError(f"data.path: not set; the source {data.source!r} needs a folder or file")
    path = location(data.path)
    may_be_missing = data.source == "tfds" or (data.source == "idx" and data.download)  # TFDS finds a set by its name
    if not may_be_missing and not path.exists():
        can_fetch = data.source == "idx" and data.name is not None
        advice = f"; set data.download=true to fetch {data.name} into it" if can_fetch else ""
        raise ConfigError(f"data.path: no such file or folder: {path}{advice}")
    return open_split(path, split, data)

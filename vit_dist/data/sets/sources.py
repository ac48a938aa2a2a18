"""The containers that images are read from, one table, and the way in: `open_source`.

A container says what examples it holds; what is done with them afterwards (some classes, a share, several sets as one,
pixels in memory) is the same for all, and done here.
"""

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
from vit_dist.schema import one_of

# What `data.source` may be, and what opens a split of it: `open_split(path, split, data)`.
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
_OF_PIXELS = ("digits", "idx", "npz")  # whose examples are arrays and not files
_NEED_NO_PATH = ("digits",)
_PATH_MAY_BE_A_NAME = ("tfds",)


def open_source(data: config.Data, split: str, channels: int = 3) -> Source:
    """Opens a split of the data that the config names.

    `data.mixture` and `data.fraction` concern the split `train` alone, `data.classes` every one. `channels` (1 or 3) is
    what `data.in_memory` decodes files to. Raises `ConfigError` for an unknown source, a missing path, split or
    library, a class without images or unknown, damaged files, classes that differ between the splits, sets that do not
    mix, too little memory.
    """
    _check_names_a_set(data)
    if data.mixture:
        source = open_mixture(data, split, _open_one)
    else:
        source = subset(_open_one(data, split), data.classes, data.fraction if split == "train" else 1.0)
    if isinstance(source, FileSource):
        if channels not in CHANNELS:
            raise ConfigError(f"model.channels: {channels}, but image files are decoded to 1 or 3")
        if data.in_memory:
            return decode_all(source, channels, int(data.memory_limit_gb * 2**30), data.threads)
    return source


def is_in_memory(data: config.Data) -> bool:
    """Whether `open_source` would give pixels in memory (an `ArraySource`), told without opening anything."""
    kinds = [part.source for part in data.mixture] or [data.source]
    return data.in_memory or all(kind in _OF_PIXELS for kind in kinds)


def _check_names_a_set(data: config.Data) -> None:
    """Raises `ConfigError` for keys of `idx` sets where none is read."""
    if "idx" in (data.source, *(part.source for part in data.mixture)):
        return
    for key, none in (("name", "null"), ("download", "false")):
        if value := getattr(data, key):
            raise ConfigError(
                f"data.{key}: {str(value).lower()}, which data.source=idx alone heeds, found {data.source}; "
                f"set data.{key}={none}"
            )


def _open_one(data: config.Data, split: str) -> Source:
    """A split of the set that `data.source` and `data.path` name, whole."""
    open_split = SOURCES[one_of("data.source", data.source, SOURCES)]
    if data.source in _NEED_NO_PATH:
        if data.path is not None:
            raise ConfigError(
                f"data.path: {data.path}, but data.source={data.source} reads no files; leave one out, or set both"
            )
        return open_split(Path(), split, data)
    if data.path is None:
        raise ConfigError(f"data.path: not set; the source {data.source!r} needs a folder or file")
    path = location(data.path)
    found_otherwise = data.source in _PATH_MAY_BE_A_NAME or (data.source == "idx" and data.download)
    if not found_otherwise and not path.exists():
        fetched = data.source == "idx" and data.name is not None
        advice = f"; set data.download=true to fetch {data.name} into it" if fetched else ""
        raise ConfigError(f"data.path: no such file or folder: {path}{advice}")
    return open_split(path, split, data)

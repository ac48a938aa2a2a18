"""A source is one split of a data set: its labels, its class names, and its images as pixels or as encoded files.

There are two kinds. An `ArraySource` holds pixels, and a batch of it is one gather; a `FileSource` reads encoded
images one by one from a folder or a tar. Which container a set came in changes nothing else: an example's id is its
index in class-then-name order (for `digits` and `idx`, the order of the file).
"""

import dataclasses
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data import archives, idx, listing
from vit_dist.data.download import known_set
from vit_dist.data.images import CHANNELS, BadImage, decode

SOURCES = ("digits", "idx", "folder", "tar")
_ARRAY_SPLITS = ("train", "test")


class Images(Protocol):
    """The encoded images of a split, by number. Safe to call from many threads; can be pickled."""

    def read(self, index: int) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Examples as pixels: `images` `uint8 [N, H, W, C]`, `labels` `int32 [N]`."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"example {index}"


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Examples as encoded images: `labels` `int32 [N]`; `names` are `class/file`, below `where`."""

    where: str
    names: tuple[str, ...]
    labels: np.ndarray
    class_names: tuple[str, ...]
    images: Images

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"{self.where}/{self.names[index]}"

    def read(self, index: int) -> bytes:
        """The encoded bytes. Raises `OSError` where the file cannot be read."""
        return self.images.read(index)


Source = ArraySource | FileSource


@dataclasses.dataclass(frozen=True)
class FolderImages:
    """Reads images from files below a folder."""

    root: str
    names: tuple[str, ...]

    def read(self, index: int) -> bytes:
        with open(f"{self.root}/{self.names[index]}", "rb") as file:
            return file.read()


def open_source(data: config.Data, split: str, channels: int = 3) -> Source:
    """Opens a split of the data set that the config names.

    `channels` (1 or 3) is what `data.in_memory` decodes files to. Raises `ConfigError` for an unknown source, a missing
    path or split, an empty class folder, a damaged archive, classes that differ between the splits, too little memory.
    """
    config.one_of("data.source", data.source, SOURCES)
    if data.source == "digits":
        images, labels = idx.read_digits(_array_split(split))
        return ArraySource(images, labels, tuple("0123456789"))
    if data.path is None:
        raise ConfigError(f"data.path: not set; the source {data.source!r} needs a folder or file")
    path = Path(data.path).expanduser()
    if not path.exists() and not (data.source == "idx" and data.download):
        raise ConfigError(f"data.path: no such file or folder: {path}")
    if data.source == "idx":
        images, labels = idx.read_idx_set(path, _array_split(split), data.download)
        return ArraySource(images, labels, known_set(path).class_names)
    if channels not in CHANNELS:
        raise ConfigError(f"model.channels: {channels}, but image files are decoded to 1 or 3")
    limit = int(data.memory_limit_gb * 2**30)
    files = _open_folder(path, split) if data.source == "folder" else _open_tar(path, split, limit)
    return decode_all(files, channels, limit, data.threads) if data.in_memory else files


def decode_all(source: FileSource, channels: int, limit: int, threads: int) -> ArraySource:
    """Decodes every image of a source into memory, on so many threads.

    Raises `ConfigError` for a file that does not decode, one not of the first one's size, or more than `limit` bytes.
    """

    def load(index: int) -> np.ndarray:
        try:
            return decode(source.read(index), channels)
        except (BadImage, OSError) as error:
            raise ConfigError(
                f"{source.name(index)}: {error}; repair or remove it, or set data.in_memory=False to skip it"
            ) from error

    shape = load(0).shape
    size = len(source) * int(np.prod(shape))
    if size > limit:
        raise ConfigError(
            f"data.in_memory: {source.where} takes {size / 2**30:.3g} GiB as pixels, more than "
            f"data.memory_limit_gb={limit / 2**30:g}; raise it or set data.in_memory=False"
        )
    images = np.empty((len(source), *shape), np.uint8)

    def store(index: int) -> None:
        image = load(index)
        if image.shape != shape:
            raise ConfigError(
                f"{source.name(index)}: {image.shape[0]}x{image.shape[1]} pixels, but {source.name(0)} has "
                f"{shape[0]}x{shape[1]}; data.in_memory needs images of one size, set it to False"
            )
        images[index] = image

    with ThreadPoolExecutor(threads) as pool:
        try:
            for _ in pool.map(store, range(len(source))):  # in order: the first odd file is the one that is named
                pass
        except ConfigError:
            pool.shutdown(cancel_futures=True)
            raise
    return ArraySource(images, source.labels, source.class_names)


def check_labels(source: Source, num_classes: int) -> None:
    """Raises `ConfigError` naming the first example whose label is not in `[0, num_classes)`."""
    wrong = np.flatnonzero((source.labels < 0) | (source.labels >= num_classes))
    if len(wrong):
        raise ConfigError(
            f"model.num_classes: {source.name(wrong[0])} (id {wrong[0]}) has label {source.labels[wrong[0]]}, which is "
            f"not in 0..{num_classes - 1}; {len(wrong)} of {len(source)} labels are out of range"
        )


def fingerprint(source: Source) -> str:
    """A short digest of the count, labels, class names, and file names or image shape: to tell data sets apart."""
    what = "\n".join(source.names) if isinstance(source, FileSource) else str(source.images.shape)
    digest = hashlib.blake2b(digest_size=8)
    for part in (str(len(source)), "\n".join(source.class_names), what):
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    digest.update(np.ascontiguousarray(source.labels, "<i4").tobytes())
    return digest.hexdigest()


def _array_split(split: str) -> str:
    found = listing.find_split(split, _ARRAY_SPLITS)
    if found is None:
        raise ConfigError(f"no split {split!r}: this source has {' and '.join(_ARRAY_SPLITS)}")
    return found


def _open_folder(path: Path, split: str) -> FileSource:
    if not path.is_dir():
        raise ConfigError(f"data.path: {path} is a file; data.source=folder needs a folder, or set data.source=tar")
    splits = listing.class_folders(path)
    name = listing.find_split(split, splits)
    if name is None:
        if archives.find_tar(path, split) is not None:
            raise ConfigError(f"data.source: {path} holds {split!r} as a tar; set data.source=tar")
        raise ConfigError(
            f"data.path: no folder {' or '.join(map(repr, listing.split_names(split)))} in {path}; "
            f"expected <split>/<class>/<image>, found: {', '.join(splits[:5]) or 'no folders'}"
        )
    images = listing.list_folder(path / name)
    if name != "train" and "train" in splits:
        images = images.with_classes(listing.class_folders(path / "train"), path / name)
    reader = FolderImages(str(path / name), images.names)
    return FileSource(str(path / name), images.names, images.labels, images.class_names, reader)


def _open_tar(path: Path, split: str, limit: int) -> FileSource:
    whole = path.is_file()
    file = path if whole else archives.find_tar(path, split)
    if file is None:
        names = " or ".join(f"{name}.tar[.gz]" for name in listing.split_names(split))
        if listing.find_split(split, listing.class_folders(path)) is not None:
            raise ConfigError(f"data.source: {path} holds {split!r} as a folder; set data.source=folder")
        raise ConfigError(f"data.path: no {names} in {path}")
    tar = archives.open_tar(file, limit)
    images, reader = archives.images_of_split(tar, split, whole)
    train_file = path if whole else archives.find_tar(path, "train")
    if train_file is not None and split != "train":
        train = archives.open_tar(train_file, limit)
        if not whole or "train" in train.splits:
            images = images.with_classes(archives.images_of_split(train, "train", whole)[0].class_names, file)
    return FileSource(str(file), images.names, images.labels, images.class_names, reader)

"""Reads sets that are arrays of pixels in NumPy's files: `.npz` as Keras and MedMNIST publish, or `.npy`.

An `.npz` is read into memory. An `.npy` on a local disk is memory-mapped, so that only the rows of each batch are
read. Examples keep the order of the array.
"""

import dataclasses
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.files import entries, is_remote, open_stream, read_file
from vit_dist.data.npy import read_member, read_npy
from vit_dist.data.sets.examples import ArraySource
from vit_dist.data.sets.formats.listing import MOST_CLASSES, NoSplit, split_names

_ERRORS = (  # of files that are no zip or no array, damaged, encrypted, or larger than the memory
    OSError, ValueError, EOFError, RuntimeError, MemoryError, KeyError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
# Names of the arrays of images and of labels: in a file of one split, and in a file of all splits.
_NAMES = (("images", "x", "data", "image"), ("labels", "y", "label"))
_NAMES_BY_SPLIT = (("x_{}", "{}_images", "{}_data"), ("y_{}", "{}_labels"))


@dataclasses.dataclass(frozen=True)
class Npz:
    """The arrays in an `.npz`, a zip of `.npy` files. `names` maps each name to its size in bytes."""

    where: Path
    names: Mapping[str, int]

    @classmethod
    def open(cls, file: Path) -> "Npz":
        try:
            with open_stream(file) as stream, zipfile.ZipFile(stream) as archive:
                return cls(file, {m.filename.removesuffix(".npy"): m.file_size for m in archive.infolist()})
        except _ERRORS as error:
            raise _unreadable(file, error) from error

    def read(self, name: str, limit: int) -> np.ndarray:
        """Returns an array. Raises `ConfigError` if it is damaged or takes more than `limit` bytes of memory."""
        where = f"{self.where}: {name!r}"
        _check_size(where, self.names[name], limit)
        try:
            with open_stream(self.where) as stream, zipfile.ZipFile(stream) as archive:
                return read_member(archive, name)
        except _ERRORS as error:
            raise _unreadable(where, error) from error


@dataclasses.dataclass(frozen=True)
class Npy:
    """The `.npy` files of a folder."""

    where: Path
    names: Collection[str]

    @classmethod
    def open(cls, folder: Path) -> "Npy":
        return cls(folder, [name.removesuffix(".npy") for name, _ in entries(folder) if name.endswith(".npy")])

    def read(self, name: str, limit: int) -> np.ndarray:
        """Returns an array, mapped into memory if it is on a local disk. Raises as `Npz.read`."""
        file = self.where / f"{name}.npy"
        if is_remote(file):
            _check_size(file, file.stat().st_size, limit)
        try:
            if not is_remote(file):
                return np.load(file, mmap_mode="r", allow_pickle=False)
            with open_stream(file) as stream:
                return read_npy(stream, file.stat().st_size)
        except _ERRORS as error:
            raise _unreadable(file, error) from error


class _Split(NamedTuple):
    """A split's name, where its arrays are, and their names."""

    name: str
    arrays: Npz | Npy
    images: str
    labels: str


def open_split(path: Path, split: str, data: config.Data) -> ArraySource:
    """Opens a split of an `.npz` of all splits, of a folder with an `.npz` for each split, or of a folder of `.npy`.

    In a file of all splits and among `.npy` files, arrays are named `x_train` and `y_train`, or `train_images` and
    `train_labels`; in a file of one split, such as `train.npz`, also `images` and `labels`, or `x` and `y`.
    Class names come from `classes.txt` or the array `class_names`, else they are the labels as text.

    Raises `ConfigError` for missing, damaged or contradictory arrays, and for images that are not `uint8 [N, H, W]` or
    `[N, H, W, C]`.
    """
    limit = int(data.memory_limit_gb * 2**30)
    chosen = next(filter(None, (_find(path, name) for name in split_names(split))), None)
    if chosen is None:
        raise _not_found(path, split)
    arrays = chosen.arrays
    images = _pixels(arrays.read(chosen.images, limit), f"{arrays.where}: {chosen.images!r}")
    labels = _labels(chosen, limit)
    if len(images) != len(labels):
        raise ConfigError(f"{arrays.where}: {len(labels)} {chosen.labels!r} for {len(images)} {chosen.images!r}")
    train = _find(path, "train")
    given = class_names_beside(path if path.is_dir() else path.parent)
    if given is None and "class_names" in arrays.names:
        names = arrays.read("class_names", limit).tolist()
        given = tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names)
    train_labels = [] if train is None or train == chosen else [_labels(train, limit)]
    class_names = class_names_for(arrays.where, given, [labels, *train_labels])
    return ArraySource(images, labels, class_names, split=chosen.name)


def class_names_beside(folder: Path) -> tuple[str, ...] | None:
    """Returns the lines of the folder's `classes.txt`, one per class in the order of labels; None if it has none."""
    file = folder / "classes.txt"
    if not file.is_file():
        return None
    lines = read_file(file).decode("utf-8", "surrogateescape").split("\n")
    return tuple(line.strip() for line in lines if line.strip())


def class_names_for(where: Path, given: tuple[str, ...] | None, labels: Iterable[np.ndarray]) -> tuple[str, ...]:
    """Returns the class names given, or if None the numbers up to the largest label of all splits.

    Raises `ConfigError`, beginning with `where`, if there are fewer names than classes.
    """
    classes = max(int(split_labels.max()) for split_labels in labels) + 1
    if given is None:
        return tuple(map(str, range(classes)))
    if len(given) < classes:
        raise ConfigError(f"{where}: labels of 0..{classes - 1}, but {len(given)} class names; name every class")
    return given


def _find(path: Path, name: str) -> _Split | None:
    """Returns the arrays of the split of this name, or None if there is none."""
    arrays = _open(path, name)
    conventions = [tuple(tuple(key.format(name) for key in keys) for keys in _NAMES_BY_SPLIT)]
    if arrays.where != path:
        conventions.append(_NAMES)
    for image_names, label_names in conventions:
        images = next((key for key in image_names if key in arrays.names), None)
        labels = next((key for key in label_names if key in arrays.names), None)
        if images is not None and labels is not None:
            return _Split(name, arrays, images, labels)
    return None


def _open(path: Path, name: str) -> Npz | Npy:
    """Returns the arrays in the file `path`, in the file of the split below it, or in the `.npy` files in it."""
    if not path.is_dir():
        return Npz.open(path)
    file = path / f"{name}.npz"
    return Npz.open(file) if file.is_file() else Npy.open(path)


def _not_found(path: Path, split: str) -> ConfigError:
    arrays = _open(path, split)
    names, expected = list(arrays.names), f"the arrays x_{split} and y_{split}, or {split}_images and {split}_labels"
    if arrays.where != path:
        expected = "the arrays images and labels"
    elif path.is_dir():
        names = [name for name, _ in entries(path)]
        expected = f"{split}.npz of images and labels, or {split}_images.npy and {split}_labels.npy"
    kind = NoSplit if arrays.where == path else ConfigError
    return kind(f"data.path: no split {split!r} in {arrays.where}; expected {expected}, found: {', '.join(names[:8])}")


def _pixels(images: np.ndarray, where: str) -> np.ndarray:
    if images.dtype != np.uint8:
        raise ConfigError(f"{where} is of {images.dtype}, expected uint8, 0 to 255; scale, round and save it as that")
    if images.ndim == 4 and images.shape[1] <= 4 < images.shape[3]:
        raise ConfigError(f"{where} is {list(images.shape)}, channels first; save its .transpose(0, 2, 3, 1)")
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise ConfigError(f"{where} is {list(images.shape)}, expected [N, H, W] or [N, H, W, C]")
    return images if images.ndim == 4 else images[..., None]


def _labels(split: _Split, limit: int) -> np.ndarray:
    labels, where = split.arrays.read(split.labels, limit), f"{split.arrays.where}: {split.labels!r}"
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise ConfigError(f"{where} is {labels.dtype} {list(labels.shape)}, expected one whole number an image, [N]")
    if labels.min() < 0:
        raise ConfigError(f"{where} holds the label {labels.min()}, expected 0 or more")
    if labels.max() >= MOST_CLASSES:
        raise ConfigError(f"{where} holds the label {labels.max()}, which is not a class number")
    return labels.astype(np.int32)


def _check_size(where: object, size: int, limit: int) -> None:
    if size > limit:
        raise ConfigError(
            f"{where} takes {size / 2**30:.3g} GiB, more than data.memory_limit_gb={limit / 2**30:g}; raise it, or "
            "save each array as .npy on a local disk, which is not read into memory"
        )


def _unreadable(where: object, error: Exception) -> ConfigError:
    return ConfigError(f"{where}: cannot be read ({error}); make or fetch it again")

"""Sets that are arrays of pixels in NumPy's files: `.npz` as Keras and MedMNIST have them, or `.npy`.

An `.npz` is read into memory; an `.npy` on a mounted disk is mapped, and only what batches touch of it is read.
Examples keep the order of the array.
"""

import dataclasses
import zipfile
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.files import entries, is_remote, open_stream
from vit_dist.data.sets.examples import ArraySource
from vit_dist.data.sets.formats.listing import MOST_CLASSES, NoSplit, split_names

_ERRORS = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
# What images and labels are called in a file of one split, and in one of several.
_OF_ONE = (("images", "x", "data", "image"), ("labels", "y", "label"))
_OF_MANY = (("x_{}", "{}_images", "{}_data"), ("y_{}", "{}_labels"))


class Arrays(Protocol):
    """Arrays by name, in one file or several."""

    @property
    def where(self) -> Path: ...
    @property
    def names(self) -> Collection[str]: ...

    def read(self, name: str, limit: int) -> np.ndarray:
        """Raises `ConfigError` where it is damaged or takes more than `limit` bytes of memory."""
        ...


@dataclasses.dataclass(frozen=True)
class Npz:
    """The arrays in an `.npz`, which is a zip of `.npy`: their names and sizes in bytes."""

    where: Path
    names: Mapping[str, int]

    @classmethod
    def open(cls, file: Path) -> "Npz":
        try:
            with open_stream(file) as stream, zipfile.ZipFile(stream) as members:
                return cls(file, {one.filename.removesuffix(".npy"): one.file_size for one in members.infolist()})
        except _ERRORS as error:
            raise _unreadable(file, error) from error

    def read(self, name: str, limit: int) -> np.ndarray:
        where = f"{self.where}: {name!r}"
        _check_size(where, self.names[name], limit)
        try:
            with open_stream(self.where) as stream, np.load(stream, allow_pickle=False) as arrays:
                return arrays[name]
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
        file = self.where / f"{name}.npy"
        if is_remote(file):
            _check_size(file, file.stat().st_size, limit)
        try:
            if not is_remote(file):
                return np.load(file, mmap_mode="r", allow_pickle=False)
            with open_stream(file) as stream:
                return np.load(stream, allow_pickle=False)
        except _ERRORS as error:
            raise _unreadable(file, error) from error


def open_split(path: Path, split: str, data: config.Data) -> ArraySource:
    """A split of an `.npz` of all splits, or of a folder of one `.npz` a split, or of a folder of `.npy`.

    In a file of all splits and among `.npy`, arrays are called `x_train` and `y_train`, or `train_images` and
    `train_labels`; in a file of one split, such as `train.npz`, also `images` and `labels`, or `x` and `y`.
    Class names are those of `classes.txt` or of the array `class_names`, else the labels as text. Raises `ConfigError`
    for what is missing, damaged, contradictory, or no `uint8 [N, H, W]` or `[N, H, W, C]`.
    """
    limit = int(data.memory_limit_gb * 2**30)
    name, found = next(((name, one) for name in split_names(split) if (one := _find(path, name))), ("", None))
    if found is None:
        raise _not_found(path, split)
    arrays, images_name, labels_name = found
    images = _pixels(arrays.read(images_name, limit), f"{arrays.where}: {images_name!r}")
    labels = _labels(found, limit)
    if len(images) != len(labels):
        raise ConfigError(f"{arrays.where}: {len(labels)} {labels_name!r} for {len(images)} {images_name!r}")
    train = _find(path, "train")
    given = class_names_beside(path if path.is_dir() else path.parent)
    if given is None and "class_names" in arrays.names:
        given = tuple(map(_text, arrays.read("class_names", limit).tolist()))
    others = [] if train is None or train == found else [_labels(train, limit)]
    return ArraySource(images, labels, class_names_for(arrays.where, given, [labels, *others]), split=name)


def class_names_beside(folder: Path) -> tuple[str, ...] | None:
    """The lines of `classes.txt`, one a class in the order of the labels, where a folder holds one."""
    file = folder / "classes.txt"
    if not file.is_file():
        return None
    return tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())


def class_names_for(where: Path, given: tuple[str, ...] | None, labels: Iterable[np.ndarray]) -> tuple[str, ...]:
    """The names given, or the numbers up to the largest of the labels of all splits.

    Raises `ConfigError` where there are fewer names than labels.
    """
    classes = max(int(some.max()) for some in labels) + 1
    if given is None:
        return tuple(map(str, range(classes)))
    if len(given) < classes:
        raise ConfigError(f"{where}: labels of 0..{classes - 1}, but {len(given)} class names; name every class")
    return given


def _find(path: Path, name: str) -> tuple[Arrays, str, str] | None:
    """Where a split of this name lies, and what its images and labels are called there."""
    kinds = [tuple(tuple(key.format(name) for key in keys) for keys in _OF_MANY)]
    arrays: Arrays
    if not path.is_dir():
        arrays = Npz.open(path)
    elif (path / f"{name}.npz").is_file():
        arrays = Npz.open(path / f"{name}.npz")
        kinds.append(_OF_ONE)
    else:
        arrays = Npy.open(path)
    for image_names, label_names in kinds:
        images = next((key for key in image_names if key in arrays.names), None)
        labels = next((key for key in label_names if key in arrays.names), None)
        if images is not None and labels is not None:
            return arrays, images, labels
    return None


def _not_found(path: Path, split: str) -> ConfigError:
    kind: type[ConfigError] = NoSplit
    if path.is_dir():
        found = [name for name, _ in entries(path)]
        expected = f"{split}.npz of images and labels, or {split}_images.npy and {split}_labels.npy"
        if f"{split}.npz" in found:
            path, kind = path / f"{split}.npz", ConfigError
            found, expected = list(Npz.open(path).names), "the arrays images and labels"
    else:
        found = list(Npz.open(path).names)
        expected = f"the arrays x_{split} and y_{split}, or {split}_images and {split}_labels"
    return kind(f"data.path: no split {split!r} in {path}; expected {expected}, found: {', '.join(found[:8])}")


def _pixels(images: np.ndarray, where: str) -> np.ndarray:
    if images.dtype != np.uint8:
        raise ConfigError(f"{where} is of {images.dtype}, expected uint8, 0 to 255; scale, round and save it as that")
    if images.ndim == 4 and images.shape[1] <= 4 < images.shape[3]:
        raise ConfigError(f"{where} is {list(images.shape)}, channels first; save its .transpose(0, 2, 3, 1)")
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise ConfigError(f"{where} is {list(images.shape)}, expected [N, H, W] or [N, H, W, C]")
    return images if images.ndim == 4 else images[..., None]


def _labels(found: tuple[Arrays, str, str], limit: int) -> np.ndarray:
    arrays, _, name = found
    labels, where = arrays.read(name, limit), f"{arrays.where}: {name!r}"
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels):
        raise ConfigError(f"{where} is {labels.dtype} {list(labels.shape)}, expected one whole number an image, [N]")
    if labels.min() < 0:
        raise ConfigError(f"{where} holds the label {labels.min()}, expected 0 or more")
    if labels.max() >= MOST_CLASSES:
        raise ConfigError(f"{where} holds the label {labels.max()}, which is no number of a class")
    return labels.astype(np.int32)


def _text(name: object) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)


def _check_size(where: object, size: int, limit: int) -> None:
    if size > limit:
        raise ConfigError(
            f"{where} takes {size / 2**30:.3g} GiB, more than data.memory_limit_gb={limit / 2**30:g}; raise it, or "
            "save each array as .npy on a local disk, which is not read into memory"
        )


def _unreadable(where: object, error: Exception) -> ConfigError:
    return ConfigError(f"{where}: cannot be read ({error}); make or fetch it again")

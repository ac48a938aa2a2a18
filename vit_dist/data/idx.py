"""Small sets that are one array of pixels: scikit-learn's digits, and the IDX files of MNIST and its relatives.

An IDX file is a big-endian header (two zero bytes, the type, the number of dimensions, each dimension as 32 bits) and
then the values. Examples keep the order they have in the file.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.data.download import KnownSet, fetch, known_set

_UNSIGNED_BYTE = 8
_DIGITS_TEST_EVERY = 5


def read_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits of scikit-learn: images `uint8 [N, 8, 8, 1]`, labels `int32 [N]`.

    Every fifth example is in the split `test` (360), the others in `train` (1,437).
    """
    from sklearn.datasets import load_digits  # here: it takes a second, which other sources need not pay

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    is_test = np.arange(len(labels)) % _DIGITS_TEST_EVERY == 0
    chosen = is_test if split == "test" else ~is_test
    return images[chosen], labels[chosen].astype(np.int32)


def read_idx_set(folder: Path, split: str, download: bool) -> tuple[np.ndarray, np.ndarray]:
    """A split, `train` or `test`, of a folder of MNIST's four files, gzipped or not: images `uint8 [N, H, W, 1]`
    and labels `int32 [N]`.

    With `download`, a missing file is fetched where the folder is that of a known set. Raises `ConfigError` for a
    missing, damaged or contradictory file.
    """
    prefix = "t10k" if split == "test" else "train"
    known = known_set(folder)
    images_file = _find(folder, f"{prefix}-images-idx3-ubyte", known, download)
    labels_file = _find(folder, f"{prefix}-labels-idx1-ubyte", known, download)
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise ConfigError(f"{labels_file}: {len(labels)} labels for the {len(images)} images of {images_file}")
    return images[:, :, :, None], labels.astype(np.int32)


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """The array in an IDX file of unsigned bytes. Raises `ConfigError` where it is not of that many dimensions."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else open(file, "rb") as stream:
            data = stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); fetch it again") from error
    magic, header = bytes([0, 0, _UNSIGNED_BYTE, dimensions]), 4 + 4 * dimensions
    if data[:4] != magic:
        raise ConfigError(f"{file}: begins with {data[:4].hex() or 'nothing'}, expected {magic.hex()}; not such a file")
    shape = struct.unpack(f">{dimensions}I", data[4:header]) if len(data) >= header else (0,)
    if len(data) != header + math.prod(shape) or 0 in shape:
        raise ConfigError(f"{file}: {len(data)} bytes do not fit its header, which says {shape}; fetch it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _find(folder: Path, name: str, known: KnownSet, download: bool) -> Path:
    files = [folder / name, folder / f"{name}.gz"]
    for file in files:
        if file.is_file():
            return file
    if download:
        fetch(known, files[1].name, folder)
        return files[1]
    raise ConfigError(
        f"data.path: no {name} or {name}.gz in {str(folder)!r}; "
        f"set data.download=True, or fetch it from {known.base}{files[1].name}"
    )

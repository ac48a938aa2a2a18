"""Reads small sets that are one array of pixels: scikit-learn's digits, and the IDX files of MNIST and similar sets.

An IDX file is a big-endian header (two zero bytes, the type, the number of dimensions, each dimension in 32 bits)
followed by the values. Examples keep their order in the file.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data import libraries
from vit_dist.data.files import open_stream
from vit_dist.data.sets.download import KNOWN, KnownSet, fetch
from vit_dist.data.sets.examples import ArraySource
from vit_dist.data.sets.formats.arrays import class_names_beside, class_names_for
from vit_dist.data.sets.formats.listing import NoSplit, required_split

_UNSIGNED_BYTE = 8
_SPLITS = ("train", "test")
_IMAGES, _LABELS = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"
_DIGITS_TEST_EVERY = 5


def open_digits(path: Path, split: str, data: config.Data) -> ArraySource:
    """Opens a split of scikit-learn's digits, which come with the library; ignores `path` and `data`."""
    name = required_split(split, _SPLITS)
    images, labels = read_digits(name)
    return ArraySource(images, labels, tuple("0123456789"), split=name)


def open_split(path: Path, split: str, data: config.Data) -> ArraySource:
    """Opens a split of the set in the folder `path`, from two of MNIST's four files, gzipped or not.

    With `data.download`, fetches missing files of the known set `data.name`. Class names are the lines of `classes.txt`
    beside the files, else those of the set `data.name`, else the labels as text: many sets come in IDX files, EMNIST's
    letters among them.

    Raises `ConfigError` for a missing, damaged or contradictory file, and if `download` is set but no set is named.
    """
    name, known = required_split(split, _SPLITS), None if data.name is None else KNOWN[data.name]
    if data.download and known is None:
        raise ConfigError(f"data.download: set data.name to say what to fetch: {' or '.join(KNOWN)}")
    prefix = "t10k" if name == "test" else "train"
    images_file, labels_file = (_find(path, kind.format(prefix), known, data.download) for kind in (_IMAGES, _LABELS))
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise ConfigError(f"{labels_file}: {len(labels)} labels for the {len(images)} images of {images_file}")
    labels_of_splits = [labels]
    if name != "train" and (train_file := _existing(path, _LABELS.format("train"))) is not None:
        labels_of_splits.append(read_idx(train_file, 1))
    given = class_names_beside(path)
    if given is None and known is not None:
        given = known.class_names
    class_names = class_names_for(path, given, labels_of_splits)
    return ArraySource(images[..., None], labels.astype(np.int32), class_names, split=name)


def read_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns images `uint8 [N, 8, 8, 1]` and labels `int32 [N]` of scikit-learn's 1,797 digits.

    Every fifth example is in the split `test` (360), the others are in `train` (1,437).
    """
    # reads scikit-learn's file without importing scikit-learn, which takes a second
    file = libraries.folder(libraries.sklearn) / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(file, dtype=np.int32, delimiter=",")  # 64 pixels of 0 to 16, and the label
    images = np.rint(rows[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    is_test = np.arange(len(rows)) % _DIGITS_TEST_EVERY == 0
    chosen = is_test if split == "test" else ~is_test
    return images[chosen], rows[chosen, -1]


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """Returns the array in an IDX file of unsigned bytes. Raises `ConfigError` if it has other dimensions."""
    try:
        with open_stream(file) as stream:
            data = stream.read()
        if file.suffix == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); fetch it again") from error
    magic, header = bytes([0, 0, _UNSIGNED_BYTE, dimensions]), 4 + 4 * dimensions
    if data[:4] != magic:
        raise ConfigError(f"{file}: begins with {data[:4].hex() or 'nothing'}, expected {magic.hex()}; not such a file")
    shape = struct.unpack(f">{dimensions}I", data[4:header]) if len(data) >= header else (0,)
    if len(data) != header + math.prod(shape) or 0 in shape:
        raise ConfigError(f"{file}: {len(data)} bytes do not fit its header, which says {shape}; fetch it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _find(folder: Path, name: str, known: KnownSet | None, download: bool) -> Path:
    file = _existing(folder, name)
    if file is not None:
        return file
    if known is not None and download:
        fetch(known, f"{name}.gz", folder)
        return folder / f"{name}.gz"
    advice = f"set data.download=true, or fetch {known.base}{name}.gz" if known else "give the folder that holds it"
    has_other_file = any(folder.glob(f"{name.partition('-')[0]}-*-ubyte*"))  # of the same split
    kind = ConfigError if has_other_file else NoSplit
    raise kind(f"data.path: no {name} or {name}.gz in {str(folder)!r}; {advice}")


def _existing(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)

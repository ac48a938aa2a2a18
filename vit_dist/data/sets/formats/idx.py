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

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data import libraries
from vit_dist.data.files import open_stream
from vit_dist.data.sets.download import KNOWN, KnownSet, fetch
from vit_dist.data.sets.examples import ArraySource
from vit_dist.data.sets.formats.arrays import class_names_beside, class_names_for
from vit_dist.data.sets.formats.listing import NoSplit, find_split

_UNSIGNED_BYTE = 8
_SPLITS = ("train", "test")
_IMAGES, _LABELS = "{}-images-idx3-ubyte", "{}-labels-idx1-ubyte"
_DIGITS_TEST_EVERY = 5


def open_digits(path: Path, split: str, data: config.Data) -> ArraySource:
    """A split of scikit-learn's digits, which come with the library: neither `path` nor `data` is looked at."""
    name = array_split(split)
    images, labels = read_digits(name)
    return ArraySource(images, labels, tuple("0123456789"), split=name)


def open_split(path: Path, split: str, data: config.Data) -> ArraySource:
    """A split of the set in the folder `path`, as `read_idx_set`.

    Class names are the lines of `classes.txt` where it lies beside the files, else those of the set that `data.name`
    says, else the labels as text: many sets come in such files, EMNIST's letters among them.
    """
    name, known = array_split(split), None if data.name is None else KNOWN[data.name]
    images, labels = read_idx_set(path, name, known, data.download)
    of_all = [labels]
    train_file = _present(path, _LABELS.format("train"))
    if name != "train" and train_file is not None:
        of_all.append(read_idx(train_file, 1))
    given = class_names_beside(path)
    if given is None and known is not None:
        given = known.class_names
    return ArraySource(images, labels, class_names_for(path, given, of_all), split=name)


def array_split(split: str) -> str:
    """`train` or `test`, which is all that these sets have. Raises `ConfigError`."""
    found = find_split(split, _SPLITS)
    if found is None:
        raise NoSplit(f"no split {split!r}: this source has {' and '.join(_SPLITS)}")
    return found


def read_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits of scikit-learn: images `uint8 [N, 8, 8, 1]`, labels `int32 [N]`.

    Every fifth example is in the split `test` (360), the others in `train` (1,437).
    """
    # scikit-learn's own file; to import scikit-learn takes a second
    file = libraries.folder(libraries.sklearn) / "datasets" / "data" / "digits.csv.gz"
    rows = np.loadtxt(file, dtype=np.int32, delimiter=",")  # 64 pixels of 0 to 16, and the label
    images = np.rint(rows[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    is_test = np.arange(len(rows)) % _DIGITS_TEST_EVERY == 0
    chosen = is_test if split == "test" else ~is_test
    return images[chosen], rows[chosen, -1]


def read_idx_set(folder: Path, split: str, known: KnownSet | None, download: bool) -> tuple[np.ndarray, np.ndarray]:
    """A split, `train` or `test`, of a folder of MNIST's four files, gzipped or not: images `uint8 [N, H, W, 1]`
    and labels `int32 [N]`.

    With `download`, a missing file of a `known` set is fetched. Raises `ConfigError` for a missing, damaged or
    contradictory file, and where nobody says what to fetch.
    """
    prefix = "t10k" if split == "test" else "train"
    if download and known is None:
        raise ConfigError(f"data.download: set data.name to say what to fetch: {' or '.join(KNOWN)}")
    images_file = _find(folder, _IMAGES.format(prefix), known, download)
    labels_file = _find(folder, _LABELS.format(prefix), known, download)
    images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
    if len(images) != len(labels):
        raise ConfigError(f"{labels_file}: {len(labels)} labels for the {len(images)} images of {images_file}")
    return images[:, :, :, None], labels.astype(np.int32)


def read_idx(file: Path, dimensions: int) -> np.ndarray:
    """The array in an IDX file of unsigned bytes. Raises `ConfigError` where it is not of that many dimensions."""
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
    found = _present(folder, name)
    if found is not None:
        return found
    if known is not None and download:
        fetch(known, f"{name}.gz", folder)
        return folder / f"{name}.gz"
    others = any(folder.glob(f"{name.partition('-')[0]}-*-ubyte*"))  # of the same split
    raise (ConfigError if others else NoSplit)(
        f"data.path: no {name} or {name}.gz in {str(folder)!r}; "
        + (
            "give the folder that holds it"
            if known is None
            else f"set data.download=true, or fetch {known.base}{name}.gz"
        )
    )


def _present(folder: Path, name: str) -> Path | None:
    return next((file for file in (folder / name, folder / f"{name}.gz") if file.is_file()), None)

"""What the tests of containers make, open, and ask of the sets that they open."""

import contextlib
import gzip
import io
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vit_dist.config import ConfigError, Data
from vit_dist.data.sets.examples import ArraySource, FileSource, Source, fingerprint
from vit_dist.data.sets.sources import open_source


def open_set(source: str, path: object, split: str = "train", **keys: Any) -> Source:
    return open_source(Data(source=source, path=None if path is None else str(path), **keys), split)


def open_files(source: str, path: object, split: str = "train", **keys: Any) -> FileSource:
    opened = open_set(source, path, split, **keys)
    assert isinstance(opened, FileSource)
    return opened


def open_arrays(source: str, path: object, split: str = "train", **keys: Any) -> ArraySource:
    opened = open_set(source, path, split, **keys)
    assert isinstance(opened, ArraySource)
    return opened


@contextlib.contextmanager
def one_line_error(message: str) -> Iterator[None]:
    """Expects a `ConfigError` of one line that matches `message`."""
    with pytest.raises(ConfigError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)


def assert_refused(source: str, message: str, path: object, split: str = "train", **keys: Any) -> None:
    with one_line_error(message):
        open_set(source, path, split, **keys)


def assert_same(one: Source, other: Source) -> None:
    """Two file sources hold the same examples, by name, label, class and byte."""
    assert isinstance(one, FileSource) and isinstance(other, FileSource)
    assert tuple(one.names) == tuple(other.names) and one.class_names == other.class_names
    assert np.array_equal(one.labels, other.labels) and fingerprint(one) == fingerprint(other)
    assert [one.read(i) for i in range(len(one))] == [other.read(i) for i in range(len(other))]


def add_file(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray, packed: bool = False) -> None:
    """Writes the two IDX files of a split: `uint8` images and labels, gzipped if `packed`."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        file = folder / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}"
        file.write_bytes(gzip.compress(data) if packed else data)

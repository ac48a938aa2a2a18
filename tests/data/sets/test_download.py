"""Fetching the known sets; the address is a folder of this machine."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest
from containers import write_idx

from vit_dist.config import ConfigError, Data
from vit_dist.data.sets import download
from vit_dist.data.sets.sources import open_source


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for MNIST's address, with sets of three images."""
    folder = tmp_path / "mirror"
    for prefix in ("train", "t10k"):
        write_idx(folder, prefix, np.zeros((3, 4, 4), np.uint8), np.zeros(3, np.uint8), packed=True)
    digests = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in download.MNIST.md5}
    known = dataclasses.replace(download.MNIST, base=folder.as_uri() + "/", md5=digests)
    monkeypatch.setitem(download.KNOWN, "mnist", known)
    return folder


def _data(tmp_path: Path) -> Data:
    return Data(source="idx", name="mnist", path=str(tmp_path / "data" / "mnist"), download=True)


def test_only_what_is_missing_is_fetched(tmp_path: Path, mirror: Path) -> None:
    assert len(open_source(_data(tmp_path), "test")) == 3
    files = sorted(file.name for file in (tmp_path / "data" / "mnist").iterdir())
    assert files == ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"]
    for file in mirror.iterdir():
        file.unlink()
    assert len(open_source(_data(tmp_path), "test")) == 3


def test_a_wrong_digest_leaves_nothing_behind(tmp_path: Path, mirror: Path) -> None:
    (mirror / "train-images-idx3-ubyte.gz").write_bytes(b"something else")
    with pytest.raises(ConfigError, match="train-images-idx3-ubyte.gz: its md5 is .*, expected "):
        open_source(_data(tmp_path), "train")
    assert list((tmp_path / "data" / "mnist").iterdir()) == []


def test_an_address_that_does_not_answer_is_named(tmp_path: Path, mirror: Path) -> None:
    (mirror / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ConfigError, match="data.download: cannot fetch .*train-labels-idx1-ubyte.gz"):
        open_source(_data(tmp_path), "train")


def test_the_set_that_is_named_is_fetched_whatever_the_folder_is_called(tmp_path: Path, mirror: Path) -> None:
    data = dataclasses.replace(_data(tmp_path), path=str(tmp_path / "fashion_mnist"))
    assert open_source(data, "test").class_names == tuple("0123456789")
    assert len(list((tmp_path / "fashion_mnist").iterdir())) == 2
    with pytest.raises(ConfigError, match="data.download: set data.name to say what to fetch: mnist or fashion_mnist"):
        open_source(dataclasses.replace(data, name=None), "train")


def test_a_missing_folder_of_a_known_set_can_be_fetched_and_the_error_says_so(tmp_path: Path) -> None:
    data = Data(source="idx", name="fashion_mnist", path=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"no such .*nowhere; set data.download=true to fetch fashion_mnist into it"):
        open_source(data, "train")

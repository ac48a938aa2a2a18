"""Arrays of strangers: what their headers claim is checked before memory is taken for it."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from vit_dist.config import Config, ConfigError, Data
from vit_dist.data.npy import read_member, read_npy
from vit_dist.data.sets.formats import arrays
from vit_dist.probe import probe_files
from vit_dist.weights.npz_files import open_npz

TERABYTES = (30 * 10**12 // 64, 8, 8)


def npy(shape, dtype="|u1", content=b""):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue() + content


def npz(file, **members):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file


@pytest.mark.parametrize(
    "array", [np.arange(6).reshape(2, 3), np.asfortranarray(np.ones((2, 3))), np.array("text"), np.zeros((0, 4))]
)
def test_what_numpy_wrote_is_read(tmp_path, array):
    np.savez_compressed(tmp_path / "a.npz", a=array)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        found = read_member(archive, "a")
        with pytest.raises(KeyError):
            read_member(archive, "b")
    assert found.dtype == array.dtype and found.shape == array.shape and (found == array).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(TERABYTES, content=b"0" * 100), r"its header says uint8\[\d+, 8, 8\] of 3\d+ bytes, but it has 100"),
        (npy((4,), "<i8", b"0" * 31), r"its header says int64\[4\] of 32 bytes, but it has 31"),
        (npy((-1, -4), content=b"0" * 4), "one unknown dimension"),
        (npy((2,), "|O", b"0" * 16), "[Oo]bject arrays cannot be loaded"),
        (b"\x93NUMPY\x03\x00" + b"0" * 100, r"version \(3, 0\)"),
        (b"no array", "magic string"),
        (b"", "EOF"),
    ],
)
def test_an_array_that_is_not_what_its_header_says_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read_npy(io.BytesIO(content), len(content))


def test_every_reader_of_arrays_refuses_30_tb_without_taking_memory(tmp_path):
    images, labels = npy(TERABYTES, content=b"0" * 100), npy((TERABYTES[0],), "<i8", b"0" * 100)
    for split in ("train", "test"):
        npz(tmp_path / f"{split}.npz", images=images, labels=labels, plan=npy(TERABYTES, content=b"0"))
    folder = tmp_path / "npy"
    folder.mkdir()
    (folder / "train_images.npy").write_bytes(images)
    (folder / "train_labels.npy").write_bytes(labels)
    data = Config(total_steps=1).data
    assert isinstance(data, Data)
    tracemalloc.start()
    with pytest.raises(ConfigError, match="train.npz: 'images': cannot be read .its header says"):
        arrays.open_split(tmp_path, "train", data)
    with pytest.raises(ConfigError, match="train_images.npy: cannot be read .mmap length is greater"):
        arrays.open_split(folder, "train", data)
    with pytest.raises(ConfigError, match="train.npz: holds no features of .*its header says"):
        probe_files(tmp_path / "train.npz", tmp_path / "test.npz")
    with pytest.raises(ConfigError, match="'images.npy' is uint8 .* by its header, which takes 3"):
        open_npz(tmp_path / "train.npz")
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()

"""Every dtype and layout gives the bits that were written, slice by slice, and a slice costs its own memory only."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from peak import PEAK_BYTES
from safetensors import safe_open
from safetensors.numpy import save_file
from weight_files import entry, npy, npz, safetensors, sparse_safetensors

from vit_dist.config import ConfigError
from vit_dist.weights import stored_tensor
from vit_dist.weights.tensors import open_tensors

SLICES = [
    (), (slice(1, 3),), (slice(None), slice(2, 4)), (slice(0, 0),), (slice(-2, None), slice(None), slice(1, None, 2)),
    (slice(None), slice(None), slice(None, None, -1)),
]  # fmt: skip
NUMBERS = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8"]
EIGHT_BITS = ["float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz"]
EIGHT_BITS_AS_STORED = ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"]


def _array(dtype: Any, shape: tuple[int, ...] = (4, 5, 6)) -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
    return bits.view(dtype)[..., 0] if dtype != "?" else np.asarray(bits[..., 0] % 2 == 0)


def _assert_same_bits(read: np.ndarray, expected: np.ndarray) -> None:
    assert type(read) is np.ndarray and read.flags.c_contiguous and read.flags.writeable
    assert read.dtype == expected.dtype and read.shape == expected.shape
    assert read.tobytes() == expected.tobytes()


def _write(file: Path, arrays: dict[str, np.ndarray]) -> None:
    if file.suffix == ".safetensors":
        save_file(arrays, file)
    else:
        (np.savez_compressed if file.stem == "compressed" else np.savez)(file, **arrays)


@pytest.mark.parametrize("name", ["model.safetensors", "model.npz", "compressed.npz"])
@pytest.mark.parametrize("dtype", [*NUMBERS, ml_dtypes.bfloat16])
def test_every_slice_has_the_bits_that_were_written(name: str, dtype: Any, tmp_path: Path, monkeypatch) -> None:
    array, scalar = _array(dtype), _array(dtype, ())
    # the odd array moves what follows it to an odd offset
    _write(tmp_path / name, {"odd": _array("u1", (3,)), "a/b.w": array, "scalar": scalar, "empty": array[:0]})
    tensors = open_tensors(tmp_path / name)
    assert {tensor.name: (tensor.shape, tensor.dtype) for tensor in tensors.values()} == {
        "odd": ((3,), np.uint8),
        "a/b.w": ((4, 5, 6), array.dtype),
        "scalar": ((), array.dtype),
        "empty": ((0, 5, 6), array.dtype),
    }
    assert list(tensors) == [tensor.name for tensor in tensors.values()]
    monkeypatch.setattr(stored_tensor, "_BLOCK_BYTES", 250)  # as if the tensor were large
    for index in SLICES:
        _assert_same_bits(tensors["a/b.w"].read(index), array[index])
    _assert_same_bits(tensors["scalar"].read(), scalar)
    _assert_same_bits(tensors["empty"].read(), array[:0])
    copy = pickle.loads(pickle.dumps(tensors["a/b.w"]))
    _assert_same_bits(copy.read((slice(1, 2),)), array[1:2])


@pytest.mark.parametrize(("dtype", "code"), list(zip(EIGHT_BITS, EIGHT_BITS_AS_STORED)))
def test_floats_of_eight_bits_are_read(dtype: str, code: str, tmp_path: Path) -> None:
    array = _array(getattr(ml_dtypes, dtype), (4, 16))
    (tmp_path / "a.safetensors").write_bytes(safetensors({"w": entry(code, array.shape)}, array.tobytes()))
    _assert_same_bits(open_tensors(tmp_path / "a.safetensors")["w"].read((slice(1, 3),)), array[1:3])


def test_the_library_reads_the_same_bits(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({str(dtype): _array(dtype) for dtype in [*NUMBERS[1:], "bfloat16"]}, file, {"format": "pt"})
    tensors = open_tensors(file)
    with safe_open(file, "numpy") as library:
        assert set(library.keys()) == set(tensors)
        for name, tensor in tensors.items():
            _assert_same_bits(tensor.read((slice(1, 3), slice(None, 4))), library.get_slice(name)[1:3, :4].copy())
            assert tensor.nbytes == library.get_tensor(name).nbytes


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["f4", ml_dtypes.bfloat16])
def test_arrays_in_fortran_order_are_read_in_c_order(compressed: bool, dtype: Any, tmp_path: Path, monkeypatch) -> None:
    array = np.asfortranarray(_array(dtype))
    monkeypatch.setattr(stored_tensor, "_BLOCK_BYTES", 50)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", w=array)
    for index in SLICES:
        _assert_same_bits(open_tensors(tmp_path / "a.npz")["w"].read(index), array[index].copy("C"))


def test_a_zip_that_begins_with_other_bytes_is_read_at_its_offsets(tmp_path: Path) -> None:
    array = _array("f4")
    (tmp_path / "a.npz").write_bytes(b"#!/bin/sh\n" + npz({"w.npy": npy(array)}))
    _assert_same_bits(open_tensors(tmp_path / "a.npz")["w"].read(), array)


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    arrays = {f"blocks.{number}.w": np.full((2, 3), number, np.float32) for number in range(5)}
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    shard_of = {name: shards[number % 2] for number, name in enumerate(arrays)}
    for shard in shards:
        save_file({name: arrays[name] for name in arrays if shard_of[name] == shard}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 120}, "weight_map": shard_of}))
    tensors = open_tensors(index)
    assert set(tensors) == set(arrays)
    for name, tensor in tensors.items():
        assert tensor.file == tmp_path / shard_of[name]
        _assert_same_bits(tensor.read(), arrays[name])


def test_a_file_that_was_cut_after_it_was_opened_is_named(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.npz", "compressed.npz"):
        file = tmp_path / name
        _write(file, {"w": _array("f4", (400, 5, 6))})
        tensor = open_tensors(file)["w"]
        file.write_bytes(file.read_bytes()[:200])
        with pytest.raises(ConfigError, match=f"{name}.* cannot be read .*fetch the file again"):
            tensor.read()
        file.unlink()
        with pytest.raises(ConfigError, match=f"{name}.* cannot be read .*No such file"):
            tensor.read()


def test_a_slice_of_a_file_of_4_gb_takes_the_memory_of_the_slice(tmp_path: Path) -> None:
    sparse_safetensors(tmp_path / "a.safetensors", (1 << 15, 1 << 15))  # 4 GiB
    code = """
import re, sys
from pathlib import Path
from vit_dist.weights.tensors import open_tensors

def private_mib():
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(kib) for kib in re.findall(r"^Private_\\w+:\\s+(\\d+)", text, re.M)) / 1024

begin = private_mib()
tensor = open_tensors(Path(sys.argv[1]))["w"]
print(private_mib() - begin)
row = tensor.read((slice(5, 6),))
print(private_mib() - begin)
corner = tensor.read((slice(1 << 14, (1 << 14) + 2048), slice(64, 2112)))
print(private_mib() - begin, row.nbytes, corner.nbytes, 'jax' in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    opened, with_row, with_corner, row_bytes, corner_bytes, jax = done.stdout.split()
    assert int(row_bytes) == 1 << 17 and int(corner_bytes) == 1 << 24 and jax == "False"
    assert float(opened) < 3 and float(with_row) < 3.2 and float(with_corner) < 20


def test_columns_of_a_large_tensor_hold_a_part_of_the_file_at_a_time(tmp_path: Path) -> None:
    sparse_safetensors(tmp_path / "a.safetensors", (1 << 15, 1 << 12))  # 512 MiB, of which every page is read
    code = f"""
import sys
from pathlib import Path
from vit_dist.weights.tensors import open_tensors
{PEAK_BYTES}
tensor = open_tensors(Path(sys.argv[1]))["w"]
before = peak_bytes()
columns = tensor.read((slice(None), slice(64, 128)))
print(peak_bytes() - before, columns.nbytes)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "a.safetensors")]
    grown, size = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(size) == 8 << 20 and int(grown) < 40 << 20


def test_other_kinds_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a.onnx: expected a .safetensors, .safetensors.index.json or .npz file"):
        open_tensors(tmp_path / "a.onnx")

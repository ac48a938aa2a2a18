"""Writes files of weights byte by byte, so that a test can make them wrong wherever it wants."""

import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


def entry(dtype: str = "F32", shape: Any = (4, 4), offsets: Any = (0, 64)) -> dict[str, Any]:
    """What the header of a safetensors file says about a tensor: by default the whole of 64 bytes."""
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def safetensors(header: Any, data: bytes = bytes(64), length: int | None = None) -> bytes:
    """A safetensors file with this header, which is JSON or bytes, and with the length that is claimed for it."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def sparse_safetensors(file: Path, shape: tuple[int, ...]) -> None:
    """Writes a file with one tensor `w` of float32 zeros, of which no byte is on the disk."""
    size = 4 * int(np.prod(shape))
    with open(file, "wb") as stream:
        stream.write(safetensors({"w": entry(shape=shape, offsets=(0, size))}, b""))
        stream.truncate(stream.tell() + size)


def npy(array: np.ndarray, **changes: Any) -> bytes:
    """An array as NumPy writes it, with `shape`, `descr` or `fortran_order` of its header changed."""
    header = {**np.lib.format.header_data_from_array_1_0(array), **changes}
    text = repr(header).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + array.tobytes("A")


def npz(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()

"""Reads arrays in NumPy's format, once their headers are found to be true.

NumPy allocates what a header claims before it reads: a file of 200 bytes may claim 30 TB.
"""

import math
import zipfile
from typing import IO

import numpy as np

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npy(stream: IO[bytes], size: int) -> np.ndarray:
    """Returns the array in a stream of `size` bytes, which can seek; raises `ValueError` for any other content."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"version {version} of the format, expected (1, 0) or (2, 0)")
    shape, _, dtype = _HEADERS[version](stream)
    claimed, found = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if claimed != found and not dtype.hasobject:
        raise ValueError(f"its header says {dtype}{list(shape)} of {claimed} bytes, but it has {found}")
    stream.seek(0)
    return np.lib.format.read_array(stream, allow_pickle=False)


def read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Returns the array `name` of an open `.npz`; raises `KeyError` if there is none, and as `read_npy`."""
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as stream:
        return read_npy(stream, member.file_size)

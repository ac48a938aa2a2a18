"""Opens `.npz` files: zips of arrays in NumPy's format, as big_vision and vision_transformer publish.

An array that is stored as it is gets mapped at its offset in the zip; a compressed one is decompressed whole for every
read. Objects, which NumPy would unpickle, are refused. NumPy has no bfloat16: arrays of two void bytes are taken as it.
"""

import functools
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from vit_dist.config import ConfigError
from vit_dist.data.files import open_stream
from vit_dist.weights.stored_tensor import FETCH_AGAIN, StoredTensor, map_array, printed, unreadable

_ERRORS = (  # what zipfile and numpy raise for files that are no zip, no array, damaged or encrypted
    OSError, ValueError, EOFError, RuntimeError, MemoryError, SyntaxError, OverflowError, struct.error, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip
_LARGEST_DIRECTORY = 2 << 20  # bytes; a member takes about 150
_LARGEST_HEADER = 10_000  # bytes of an array's header, as numpy limits it
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a member: ends with the lengths of its name and of its extra field
_BOMB_RATIO, _BOMB_BYTES = 100, 100 << 20
_BFLOAT16_AS_STORED = np.dtype("V2")
_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class _Header(NamedTuple):
    """What an array says about itself, and how many bytes it takes to say so."""

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype
    length: int


class _BoundedFile(io.FileIO):
    """A file of which at most `_LARGEST_DIRECTORY` bytes are read at once: zipfile trusts the sizes in a file."""

    def read(self, size: int | None = -1, /) -> bytes:
        most = _LARGEST_DIRECTORY + 1
        content = super().read(most if size is None or size < 0 else min(size, most)) or b""
        if len(content) == most:
            raise ValueError(f"its directory is larger than {_LARGEST_DIRECTORY >> 20} MiB")
        return content


def open_npz(file: Path) -> dict[str, StoredTensor]:
    """Returns the arrays of an `.npz` by name. Raises `ConfigError` if it is damaged or holds more than numbers."""
    try:
        open_stream(file).close()  # raises for a pipe, at which the next line would wait
        with _BoundedFile(file) as stream, zipfile.ZipFile(stream) as archive:
            return _open_members(file, stream, archive)
    except ConfigError:
        raise
    except _ERRORS as error:
        raise unreadable(file, error) from error


def _open_members(file: Path, stream: _BoundedFile, archive: zipfile.ZipFile) -> dict[str, StoredTensor]:
    members = sorted(archive.infolist(), key=lambda member: member.header_offset)
    size, unpacked = file.stat().st_size, sum(member.file_size for member in members)
    if unpacked > max(_BOMB_BYTES, _BOMB_RATIO * size):
        raise ConfigError(f"{file}: its {size} bytes claim to unpack to {unpacked}, as no weights do; {FETCH_AGAIN}")
    tensors: dict[str, StoredTensor] = {}
    ends = [member.header_offset for member in members[1:]] + [archive.start_dir]
    for member, end in zip(members, ends):
        name, where = member.filename.removesuffix(".npy"), f"{file}: '{printed(member.filename)}'"
        if name == member.filename:
            raise ConfigError(f"{where} is no array (.npy); save the weights alone, by numpy.savez")
        if name in tensors:
            raise ConfigError(f"{where} occurs twice; {FETCH_AGAIN}")
        if member.flag_bits & 1:
            raise ConfigError(f"{where} is encrypted; unpack it with its password and save it again")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ConfigError(f"{where} is compressed in a way that NumPy does not write; save it again by numpy.savez")
        stream.seek(member.header_offset)
        start = stream.tell() + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size)))
        if start + member.compress_size > end:
            raise ConfigError(f"{where} overlaps what follows it in the file; {FETCH_AGAIN}")
        with archive.open(member) as content:
            header = _read_header(where, content.read(_LARGEST_HEADER + 12))
        dtype = np.dtype(ml_dtypes.bfloat16) if header.dtype == _BFLOAT16_AS_STORED else header.dtype
        load: Any = functools.partial(_decompress, file, member.filename)
        if member.compress_type == zipfile.ZIP_STORED:
            load = functools.partial(map_array, file, start + header.length, header.shape, header.dtype, header.order)
        tensors[name] = StoredTensor(name, header.shape, dtype, file, load)
        expected = header.length + tensors[name].nbytes
        if expected != member.file_size:
            raise ConfigError(
                f"{where} is {header.dtype} {printed(list(header.shape))} by its header, which takes {expected} bytes, "
                f"but has {member.file_size}; {FETCH_AGAIN}"
            )
        if member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
            raise ConfigError(f"{where} is not compressed, but has two sizes; {FETCH_AGAIN}")
    return tensors


def _read_header(where: str, content: bytes) -> _Header:
    """Returns the header that `content`, the beginning of a `.npy`, begins with."""
    stream = io.BytesIO(content)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in _HEADER_READERS:
            raise ValueError(f"version {version} of the format, expected (1, 0) or (2, 0)")
        shape, fortran_order, dtype = _HEADER_READERS[version](stream, max_header_size=_LARGEST_HEADER)
    except _ERRORS as error:
        raise unreadable(where, error) from error
    if dtype.hasobject:
        raise ConfigError(f"{where} holds pickled objects, which are never loaded; save it as an array of numbers")
    if dtype.kind not in "biufc" and dtype != _BFLOAT16_AS_STORED:
        raise ConfigError(f"{where} is of {printed(dtype)}, expected numbers; save the weights alone, by numpy.savez")
    if not dtype.isnative:
        raise ConfigError(f"{where} is of big-endian numbers; save it as little-endian, by .astype('<f4')")
    return _Header(tuple(map(int, shape)), "F" if fortran_order else "C", dtype, stream.tell())


def _decompress(file: Path, member: str) -> np.ndarray:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return arrays[member]
    except _ERRORS as error:
        raise unreadable(f"{file}: {member!r}", error) from error

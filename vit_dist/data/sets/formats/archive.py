"""A tar as bytes that are read by position, and what is in it; nothing is ever unpacked to a disk.

A plain tar is read where it lies. A compressed one can only be read from its beginning, so the first read decompresses
it into memory, up to a limit, and it is read there by the same offsets. What no folder of plain files would hold
(links, devices, paths that climb out) is refused here, for every format that is made of tars.
"""

import bz2
import gzip
import io
import logging
import lzma
import posixpath
import tarfile
import threading
import weakref
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.files import File, open_file, open_stream, stamp
from vit_dist.data.progress_bar import bar

_log = logging.getLogger(__name__)
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_CHUNK = 1 << 20
_BLOCK = 512  # bytes; a tar is made of these
_SHOWN_EVERY = 16 << 20  # bytes between two looks of the progress bar


class Memory:
    """What the compressed tars of one source may take once unpacked, all of them together: `limit` bytes a process.

    Every process unpacks them for itself, so that each of `processes` may take its part of what the config allows.
    """

    def __init__(self, limit: int, advice: str, processes: int = 1) -> None:
        """`advice` says what to do, but for a higher limit, where it is too low."""
        self.limit, self.advice, self.processes = limit, advice, processes
        self._taken = 0
        self._lock = threading.Lock()

    @classmethod
    def of(cls, data: config.Data, advice: str) -> "Memory":
        """`data.memory_limit_gb`, shared by this process and the workers."""
        processes = 1 + data.workers
        return cls(int(data.memory_limit_gb * 2**30) // processes, advice, processes)

    def take(self, size: int, path: Path) -> None:
        """Counts `size` more bytes. Raises `ConfigError` past the limit."""
        with self._lock:
            self._taken += size
            if self._taken > self.limit:
                share, fewer = "", ""
                if self.processes > 1:
                    share = f" / {self.processes} (this process and each worker unpack it for themselves)"
                    fewer = "take fewer data.workers, "
                raise ConfigError(
                    f"{path}: more than data.memory_limit_gb={self.limit * self.processes / 2**30:g}{share} once "
                    f"unpacked; raise it, {fewer}or {self.advice}"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return Memory, (self.limit, self.advice, self.processes)


class Tar:
    """The bytes of a tar, plain or compressed, read by position.

    What is pickled is the path: a worker process opens the file for itself. The first read, or `stream`, raises
    `ConfigError` where the file cannot be read or is compressed and takes more than `memory` has once unpacked.
    """

    def __init__(self, path: Path, memory: Memory, stamp: str) -> None:
        self.path, self.memory, self.stamp = path, memory, stamp
        self._unpacked: bytes | None = None  # of a compressed tar
        self._file: File | None = None
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        return self._opened().read(offset, size)

    def stream(self) -> IO[bytes]:
        """The tar, decompressed, to be read from its beginning."""
        self._opened()
        return open_stream(self.path) if self._unpacked is None else io.BytesIO(self._unpacked)

    def _opened(self) -> File:
        if self._file is None:
            with self._lock:
                if self._file is None:
                    try:
                        self._file = self._open()
                    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                        raise ConfigError(f"{self.path}: cannot be read ({error})") from error
        return self._file

    def _open(self) -> File:
        file = open_file(self.path)
        start = file.read(0, max(map(len, _OPENERS)))
        opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
        if opener is None:
            return file
        _log.info("unpacking %s into memory", self.path)
        self._unpacked = self._decompress(opener)
        return _Bytes(self._unpacked)

    def _decompress(self, opener: Callable[..., Any]) -> bytes:
        unpacked = io.BytesIO()
        with open_stream(self.path) as packed, opener(packed) as stream:
            while chunk := stream.read(_CHUNK):
                self.memory.take(len(chunk), self.path)
                unpacked.write(chunk)
        return unpacked.getvalue()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tar, (self.path, self.memory, self.stamp)


class _Bytes(NamedTuple):
    """Bytes that are in memory, as a `File`."""

    content: bytes

    def read(self, offset: int, size: int) -> bytes:
        return self.content[offset : offset + size]


_open_tars: weakref.WeakValueDictionary[tuple[Any, ...], Tar] = weakref.WeakValueDictionary()


def open_tar(path: Path, memory: Memory) -> Tar:
    """The tar at `path`; while a source still holds it, the same one, so that it is unpacked once."""
    stamped = stamp(path)
    key = (str(path.resolve()), stamped, memory.limit, memory.processes)
    tar = _open_tars.get(key)
    if tar is None:
        tar = _open_tars[key] = Tar(path, memory, stamped)
    return tar


class Member(NamedTuple):
    """A file or folder inside a tar: its path, and where its `size` bytes lie."""

    parts: tuple[str, ...]
    offset: int
    size: int
    is_folder: bool

    @property
    def name(self) -> str:
        return "/".join(self.parts)


def members(stream: IO[bytes], where: object, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """The members of a tar in the order they lie in it; of one inside another tar, `start` and `end` say where it is.

    The stream may be read between two of them. Raises `ConfigError` for a damaged tar, for one that is none, and for
    members that reach outside or are links, devices or sparse.
    """
    stream.seek(start)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte for each
                if end is not None and member.offset >= end:
                    return  # it has no end mark, and what follows is the tar around it
                if member.size < 0 or (end is not None and member.offset_data + member.size > end):
                    raise ConfigError(f"{where}: member {member.name!r} is damaged; make or fetch it again")
                yield Member(_parts(member, where), member.offset_data, member.size, member.isdir())
            stream.seek(tar.offset)
            if stream.read(_BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the end
                raise ConfigError(f"{where}: damaged at byte {tar.offset}; make or fetch it again")
    except (tarfile.TarError, OSError, OverflowError) as error:
        raise ConfigError(f"{where}: not a tar, or a damaged one ({error})") from error


def followed(found: Iterator[Member], tar: Tar) -> Iterator[Member]:
    """The members of a large tar, with a bar that shows how many of its MiB lie behind them."""
    with tar.stream() as stream:
        size = stream.seek(0, io.SEEK_END)
    with bar() as shown:
        task = shown.add_task(f"indexing {tar.path} (MiB)", total=size >> 20)
        done = 0
        for member in found:
            if member.offset - done > _SHOWN_EVERY:
                done = member.offset
                shown.update(task, completed=done >> 20)
            yield member


def _parts(member: tarfile.TarInfo, where: object) -> tuple[str, ...]:
    name = posixpath.normpath(member.name)
    if name.startswith("/") or name.split("/")[0] == "..":
        raise ConfigError(f"{where}: member {member.name!r} reaches outside the archive; make it again without")
    if not (member.isdir() or (member.isfile() and not member.issparse())):
        raise ConfigError(
            f"{where}: member {member.name!r} is a link, device or sparse file; expected plain files only"
        )
    return tuple(part for part in name.split("/") if part != ".")

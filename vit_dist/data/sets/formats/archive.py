"""Reads tars by byte offset, and lists their members. Nothing is unpacked to a disk.

A plain tar is read in place. A compressed one can only be read from its beginning, so the first read decompresses it
into memory, up to a limit, and the same offsets apply there. Links, devices and paths that lead out of the tar are
refused here, for every format that consists of tars.
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
_SHOWN_EVERY = 16 << 20  # bytes between two updates of the progress bar


class MemoryLimit:
    """Limits the bytes that a source's compressed tars take in memory, all of them together.

    Every process unpacks them for itself, so each of `processes` gets an equal share of what the config allows.
    """

    def __init__(self, limit: int, advice: str, processes: int = 1) -> None:
        """Allows `limit` bytes in this process; `advice` is what to do, besides raising the limit, if it is too low."""
        self.limit, self.advice, self.processes = limit, advice, processes
        self._used = 0
        self._lock = threading.Lock()

    @classmethod
    def of(cls, data: config.Data, advice: str) -> "MemoryLimit":
        """Shares `data.memory_limit_gb` between this process and the workers."""
        processes = 1 + data.workers
        return cls(int(data.memory_limit_gb * 2**30) // processes, advice, processes)

    def add(self, size: int, path: Path) -> None:
        """Counts `size` more bytes, of the tar at `path`. Raises `ConfigError` beyond the limit."""
        with self._lock:
            self._used += size
            if self._used > self.limit:
                share, fewer = "", ""
                if self.processes > 1:
                    share = f" / {self.processes} (this process and each worker unpack the tars for themselves)"
                    fewer = "take fewer data.workers, "
                raise ConfigError(
                    f"{path}: the tars unpacked so far take more than data.memory_limit_gb="
                    f"{self.limit * self.processes / 2**30:g}{share}; raise it, {fewer}or {self.advice}"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return MemoryLimit, (self.limit, self.advice, self.processes)


class Tar:
    """The bytes of a tar, plain or compressed, read by offset.

    Only the path is pickled: a worker process opens the file for itself. The first `read` or `stream` raises
    `ConfigError` if the file cannot be read, or is compressed and exceeds the memory limit once unpacked.
    """

    def __init__(self, path: Path, memory: MemoryLimit, stamp: str) -> None:
        self.path, self.memory, self.stamp = path, memory, stamp
        self._unpacked: bytes | None = None  # of a compressed tar
        self._file: File | None = None
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        return self._opened().read(offset, size)

    def stream(self) -> IO[bytes]:
        """Returns a stream of the tar, decompressed."""
        self._opened()
        return open_stream(self.path) if self._unpacked is None else io.BytesIO(self._unpacked)

    def _opened(self) -> File:
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
        with open_stream(self.path) as compressed, opener(compressed) as stream:
            while chunk := stream.read(_CHUNK):
                self.memory.add(len(chunk), self.path)
                unpacked.write(chunk)
        return unpacked.getvalue()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tar, (self.path, self.memory, self.stamp)


class _Bytes(NamedTuple):
    """Bytes in memory, as a `File`."""

    content: bytes

    def read(self, offset: int, size: int) -> bytes:
        return self.content[offset : offset + size]


_open_tars: weakref.WeakValueDictionary[tuple[Any, ...], Tar] = weakref.WeakValueDictionary()


def open_tar(path: Path, memory: MemoryLimit) -> Tar:
    """Returns the tar at `path`: the same object while a source still holds it, so that it is unpacked only once."""
    stamped = stamp(path)
    key = (str(path.resolve()), stamped, memory.limit, memory.processes)
    tar = _open_tars.get(key)
    if tar is None:
        tar = _open_tars[key] = Tar(path, memory, stamped)
    return tar


class Member(NamedTuple):
    """A file or folder inside a tar. `path` is split at the slashes; the content is `size` bytes at `offset`."""

    path: tuple[str, ...]
    offset: int
    size: int
    is_folder: bool

    @property
    def name(self) -> str:
        return "/".join(self.path)


def members(stream: IO[bytes], where: object, start: int = 0, end: int | None = None) -> Iterator[Member]:
    """Yields the members of a tar in the order of the file.

    Args:
      stream: the tar, or a tar that contains it. It may be read between two members.
      where: names the tar in errors.
      start: the byte of the stream at which the tar begins.
      end: the byte after its last; None for the end of the stream.

    Raises:
      ConfigError: for a damaged tar or another file, and for members that are links, devices or sparse files, or lead
        out of the tar.
    """
    stream.seek(start)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte for each member
                if end is not None and member.offset >= end:
                    return  # it has no end mark, and this member is of the tar around it
                if member.size < 0 or (end is not None and member.offset_data + member.size > end):
                    raise ConfigError(f"{where}: member {member.name!r} is damaged; make or fetch it again")
                yield Member(_checked_path(member, where), member.offset_data, member.size, member.isdir())
            stream.seek(tar.offset)
            if stream.read(_BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the end of the tar
                raise ConfigError(f"{where}: damaged at byte {tar.offset}; make or fetch it again")
    except (tarfile.TarError, OSError, OverflowError) as error:
        raise ConfigError(f"{where}: not a tar, or a damaged one ({error})") from error


def scan(tar: Tar, list_members: Callable[[IO[bytes], Path], Iterator[Member]] = members) -> Iterator[Member]:
    """Yields the members of a tar as `list_members` does, and shows how many of its MiB have been read."""
    with tar.stream() as stream, bar() as progress:
        task = progress.add_task(f"indexing {tar.path} (MiB)", total=stream.seek(0, io.SEEK_END) >> 20)
        done = 0
        for member in list_members(stream, tar.path):
            if member.offset - done > _SHOWN_EVERY:
                done = member.offset
                progress.update(task, completed=done >> 20)
            yield member


def _checked_path(member: tarfile.TarInfo, where: object) -> tuple[str, ...]:
    name = posixpath.normpath(member.name)
    if name.startswith("/") or name.split("/")[0] == "..":
        raise ConfigError(f"{where}: member {member.name!r} reaches outside the archive; make it again without")
    if not (member.isdir() or (member.isfile() and not member.issparse())):
        raise ConfigError(
            f"{where}: member {member.name!r} is a link, device or sparse file; expected plain files only"
        )
    return tuple(step for step in name.split("/") if step != ".")

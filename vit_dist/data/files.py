"""Where bytes lie: on a disk that is mounted here, or wherever fsspec reaches (`gs://`, `s3://`, ...).

A location is a `pathlib.Path`, or universal_pathlib's likeness of one over fsspec; the rest of the room speaks pathlib
and does not ask which. What pathlib has no quick word for is here: listing a large folder, reading a file by position.
"""

import contextlib
import os
import resource
import stat
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, cast

from upath import UPath

from vit_dist.config import ConfigError

_SETTLED_NS = 2_000_000_000  # a clock's tick, and some more for a network
_OTHER_FILES = 256  # that a process has open: libraries, pipes, connections


def location(text: str, key: str = "data.path") -> Path:
    """The place that a config or command names: `~/images`, `/data/train.tar`, `gs://bucket/images`.

    Raises `ConfigError` where fsspec knows no such scheme or lacks its plug-in, and where the place does not answer.
    """
    text = text.removeprefix("file://").removeprefix("local://")
    if "://" not in text:
        try:
            return Path(text).expanduser()
        except RuntimeError as error:
            raise ConfigError(f"{key}: {text}: no home folder of that user is known; write the path out") from error
    try:
        remote = cast(Path, UPath(text))
        remote.exists()  # the first contact: without a network or the right credentials it fails here
        return remote
    except (ImportError, OSError, ValueError) as error:
        said = first_line(error)
        raise ConfigError(
            f"{key}: {text} cannot be reached ({said}); check address, network and credentials"
        ) from error


def is_remote(path: Path) -> bool:
    return not isinstance(path, Path)


def entries(folder: Path) -> list[tuple[str, bool]]:
    """`(name, is a folder)` of all that lies in a folder, sorted; one request where the folder is remote."""
    if is_remote(folder):
        remote = cast(Any, folder)
        listed = remote.fs.ls(remote.path, detail=True)
        return sorted((one["name"].rstrip("/").rpartition("/")[2], one["type"] == "directory") for one in listed)
    with os.scandir(folder) as found:
        return sorted((entry.name, entry.is_dir()) for entry in found)


def stamp(file: Path) -> str:
    """A text that changes when a file is written anew."""
    if is_remote(file):
        remote = cast(Any, file)
        return str(remote.fs.ukey(remote.path))
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def folders_stamp(folders: Sequence[Path]) -> str | None:
    """A text that changes when an entry of one of these folders comes or goes.

    None where there is no telling: folders of an object store have no date of their own, and in one that changed in
    the last seconds something more may change within the same tick of its clock.
    """
    if any(map(is_remote, folders)):
        return None
    times = [folder.stat().st_mtime_ns for folder in folders]
    return None if max(times) > time.time_ns() - _SETTLED_NS else " ".join(map(str, times))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream whose content becomes the local file `path` at the end of the block: all of it, or none on an error.

    A reader, or a run that takes up after a kill, sees the old file or the new one and never half of either.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(partial, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def printable(name: str) -> str:
    """A name for people: file names are bytes, and what of them is no UTF-8 is written as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def first_line(error: Exception) -> str:
    """What a library says of an error, in a few words: some say it in pages."""
    return (str(error) or type(error).__name__).splitlines()[0].split(";")[0]


class File(Protocol):
    """Bytes that are read by position, by any number of threads at once; what is pickled is the way to them."""

    def read(self, offset: int, size: int) -> bytes: ...


class LocalFile:
    """A file on a mounted disk, opened at the first read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = -1
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        if self._descriptor < 0:
            with self._lock:
                if self._descriptor < 0:
                    self._descriptor = _open_regular(self.path)
        return os.pread(self._descriptor, size, offset)

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalFile, (self.path,)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


class RemoteFile:
    """A file that fsspec reads, a range at a time."""

    def __init__(self, path: Path) -> None:
        self.path = cast(Any, path)

    def read(self, offset: int, size: int) -> bytes:
        return self.path.fs.cat_file(self.path.path, offset, offset + size)


def open_file(path: Path) -> File:
    """The file at `path`, to be read by position."""
    return RemoteFile(path) if is_remote(path) else LocalFile(path)


def open_stream(path: Path) -> IO[bytes]:
    """The file at `path`, to be read from its beginning; seeks are cheap on both kinds."""
    return cast(IO[bytes], path.open("rb")) if is_remote(path) else open(path, "rb", opener=_open_regular)


def read_file(path: Path) -> bytes:
    """All of the file at `path`."""
    if is_remote(path):
        return path.read_bytes()  # one request, where a stream would make two
    with open_stream(path) as stream:
        return stream.read()


def _open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Opens a file of a disk. Of a pipe or device, which would be waited for or read without end, raises `OSError`."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is a pipe, device or folder and no file")
    return descriptor


_may_open: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()


def allow_open_files(holders: Sequence[object], each: int, where: object) -> None:
    """Lets this process, and those it starts, keep `each` local files open for each of the holders while they live.

    That is beside the files of all other holders. Raises `ConfigError` where the system does not allow as many.
    """
    _may_open.update(dict.fromkeys(holders, each))
    count = sum(_may_open.values())
    needed = count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{where}: with it {count} files are kept open at once, but a process may open {hard} here; raise that "
            f"(ulimit -Hn {needed}), or make the data into fewer shards"
        ) from error

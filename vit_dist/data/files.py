"""Reads files on a mounted disk and files that fsspec can reach (`gs://`, `s3://`, ...) in the same way.

A location is a `pathlib.Path`, or the object of the same interface that universal_pathlib makes for an fsspec address;
the rest of `data/` uses pathlib's methods and does not check which of the two it has. This module adds what pathlib
does slowly or not at all: listing a large folder, reading a file at an offset, replacing a file atomically.
"""

import contextlib
import glob
import os
import re
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
from vit_dist.paths import expanded

_SETTLED_NS = 2_000_000_000  # the tick of a file system's clock, with room for that of a network file system
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")  # the names of files that `replacing` writes
_OTHER_FILES = 256  # open files of a process besides the data: libraries, pipes, connections


def location(text: str, key: str = "data.path") -> Path:
    """Returns the path that `text` names: `~/images`, `/data/train.tar`, `gs://bucket/images`.

    Raises `ConfigError`, which begins with `key`, if fsspec does not know the scheme or lacks the plug-in for it, if
    the address does not answer, or if the home folder of `~user` is unknown.
    """
    text = text.removeprefix("file://").removeprefix("local://")
    if "://" not in text:
        return expanded(text, key)
    try:
        remote = cast(Path, UPath(text))
        remote.exists()  # the first request: it fails without a network or the right credentials
        return remote
    except (ImportError, OSError, ValueError) as error:
        raise ConfigError(
            f"{key}: {text} cannot be reached ({first_line(error)}); check address, network and credentials"
        ) from error


def is_remote(path: Path) -> bool:
    """Returns whether fsspec reads this path, not the operating system."""
    return not isinstance(path, Path)


def entries(folder: Path) -> list[tuple[str, bool]]:
    """Returns `(name, is a folder)` of every entry of a folder, sorted. Sends one request if the folder is remote."""
    if is_remote(folder):
        remote = cast(Any, folder)
        listing = remote.fs.ls(remote.path, detail=True)
        return sorted((entry["name"].rstrip("/").rpartition("/")[2], entry["type"] == "directory") for entry in listing)
    with os.scandir(folder) as listing:
        return sorted((entry.name, entry.is_dir()) for entry in listing)


def stamp(file: Path) -> str:
    """Returns a text that changes when the file is written again."""
    if is_remote(file):
        remote = cast(Any, file)
        return str(remote.fs.ukey(remote.path))
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def folders_stamp(folders: Sequence[Path]) -> str | None:
    """Returns a text that changes when an entry is added to one of these folders or removed from it.

    Returns None if the dates of the folders cannot show it: a folder of an object store has no date, and a folder that
    changed in the last two seconds can change again within the same tick of the file system's clock.
    """
    if any(map(is_remote, folders)):
        return None
    dates = [folder.stat().st_mtime_ns for folder in folders]
    return None if max(dates) > time.time_ns() - _SETTLED_NS else " ".join(map(str, dates))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yields a stream whose content replaces the local file `path` when the block ends without an error.

    The replacement is atomic: a reader, or a run that resumes after a kill, sees the complete old file or the complete
    new one.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with making(path):
        stream = open(partial, "xb")
    try:
        with stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        with making(path):
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def making(path: Path) -> Iterator[None]:
    """Raises `ConfigError` where a file or folder `path` cannot be made because its folder is gone, or takes none."""
    try:
        yield
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: nothing can be made in {path.parent} ({error.strerror}); give another") from error


def remove_partial(folder: Path, name: str = "*") -> None:
    """Removes the files in a folder that `replacing` was writing when its process was killed.

    Nobody else may be writing there. `name` is that of the file to be replaced; "*": any.
    """
    for file in folder.glob(f".{name if name == '*' else glob.escape(name)}.*.tmp"):
        if _PARTIAL.fullmatch(file.name):
            file.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    """Returns the first line of an error's message up to a semicolon: the messages of some libraries fill pages."""
    return (str(error) or type(error).__name__).splitlines()[0].split(";")[0]


class File(Protocol):
    """A file that any number of threads can read at once. Pickling one keeps its path, not its content."""

    def read(self, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset` on; fewer at the end of the file."""
        ...


class LocalFile:
    """A file on a mounted disk, which is opened at the first read."""

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
    """A file that fsspec reads, with one request for each read."""

    def __init__(self, path: Path) -> None:
        self.path = cast(Any, path)

    def read(self, offset: int, size: int) -> bytes:
        return self.path.fs.cat_file(self.path.path, offset, offset + size)


def open_file(path: Path) -> File:
    """Returns the file at `path`, to be read at any offset."""
    return RemoteFile(path) if is_remote(path) else LocalFile(path)


def open_stream(path: Path) -> IO[bytes]:
    """Opens the file at `path` as a stream. Seeking is cheap, for local and for remote files."""
    return cast(IO[bytes], path.open("rb")) if is_remote(path) else open(path, "rb", opener=_open_regular)


def read_file(path: Path) -> bytes:
    """Returns the content of the file at `path`."""
    if is_remote(path):
        return path.read_bytes()  # one request; a stream would send two
    with open_stream(path) as stream:
        return stream.read()


def _open_regular(path: str | Path, flags: int = os.O_RDONLY) -> int:
    """Opens a regular file. Raises `OSError` for a pipe or device, whose reading could block or never end."""
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is a pipe, device or folder and no file")
    return descriptor


_open_files: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()  # by holder, while it lives


def allow_open_files(holders: Sequence[object], files_each: int, data: object) -> None:
    """Raises this process's limit of open files, which the processes that it starts inherit.

    Args:
      holders: objects that keep local files open while they live. The files of all holders of all calls are added up.
      files_each: how many files each of these holders keeps open.
      data: path of the data that needs the files, for the error.

    Raises:
      ConfigError: the system does not allow as many.
    """
    _open_files.update(dict.fromkeys(holders, files_each))
    count = sum(_open_files.values())
    needed = count + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"{data}: {count} files must be open at once, but this process may open {hard} only; raise the limit "
            f"(ulimit -Hn {needed}), or prepare the data with fewer shards"
        ) from error

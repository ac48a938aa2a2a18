"""Images inside a tar, read where they lie: never unpacked, found by offset and size.

A plain tar is read with `os.pread`, which any number of threads may call at once. A compressed one can only be read
from its beginning, so it is decompressed once into memory, up to a limit, and read there by the same offsets.
"""

import bz2
import dataclasses
import functools
import gzip
import io
import lzma
import os
import posixpath
import tarfile
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.data.listing import (
    KNOWN_SPLITS,
    Listing,
    find_split,
    is_hidden,
    is_image,
    list_images,
    report_ignored,
    split_names,
)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_CHUNK = 1 << 20
_BLOCK = 512  # bytes; a tar is made of these

Span = tuple[int, int]  # offset and size in bytes
Classes = dict[str, dict[str, Span]]  # class -> image -> where it lies


class Tar:
    """The bytes of a tar, plain or compressed, and what is in it.

    What is pickled is the path: a worker process opens the file for itself. Raises `ConfigError` where the file is
    missing, damaged, or compressed and larger than `limit` bytes once unpacked.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self._descriptor = -1
        self._memory: memoryview | None = None
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            start = os.pread(self._descriptor, 6, 0)
            opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
            if opener is not None:
                self._memory = self._decompress(opener)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise ConfigError(f"{path}: cannot be read ({error})") from error

    def read(self, offset: int, size: int) -> bytes:
        if self._memory is not None:
            return bytes(self._memory[offset : offset + size])
        return os.pread(self._descriptor, size, offset)

    @functools.cached_property
    def splits(self) -> dict[str, Classes]:
        """The images by split and class; split "" where the class folders lie at the top.

        Raises `ConfigError` for a damaged tar and for members that reach outside or are links or devices.
        """
        stream = open(self.path, "rb") if self._memory is None else io.BytesIO(self._memory)
        with stream:
            try:
                return _scan(stream, self.path)
            except tarfile.TarError as error:
                raise ConfigError(f"{self.path}: not a tar, or a damaged one ({error})") from error

    def _decompress(self, opener: Callable[..., Any]) -> memoryview:
        unpacked = io.BytesIO()
        with opener(self.path) as stream:
            while chunk := stream.read(_CHUNK):
                if unpacked.tell() + len(chunk) > self.limit:
                    raise ConfigError(
                        f"{self.path}: more than data.memory_limit_gb={self.limit / 2**30:g} once unpacked; raise it, "
                        f"or unpack it (mkdir FOLDER && tar -xf {self.path} -C FOLDER) and set data.source=folder"
                    )
                unpacked.write(chunk)
        return unpacked.getbuffer()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tar, (self.path, self.limit)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


_open: weakref.WeakValueDictionary[tuple[Any, ...], Tar] = weakref.WeakValueDictionary()


def open_tar(path: Path, limit: int) -> Tar:
    """The tar at `path`; while a source still holds it, the same one, so that it is scanned and unpacked once."""
    if not path.is_file():
        raise ConfigError(f"data.path: no such file: {path}")
    status = path.stat()
    key = (path.resolve(), status.st_size, status.st_mtime_ns, limit)
    tar = _open.get(key)
    if tar is None:
        tar = _open[key] = Tar(path, limit)
    return tar


@dataclasses.dataclass(frozen=True)
class TarImages:
    """Reads the images of one split by number. `spans` is `int64 [N, 2]`."""

    tar: Tar
    spans: np.ndarray

    def read(self, index: int) -> bytes:
        offset, size = self.spans[index]
        return self.tar.read(int(offset), int(size))


def find_tar(folder: Path, split: str) -> Path | None:
    """The tar of a split in a folder of them, such as `train.tar.gz`."""
    files = (folder / f"{name}{suffix}" for name in split_names(split) for suffix in TAR_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def images_of_split(tar: Tar, split: str, whole: bool) -> tuple[Listing, TarImages]:
    """A split of a tar that holds all of them (`whole`), or of the split's own tar, where its folder may be missing."""
    name = find_split(split, tar.splits)
    if name is None and not whole and "" in tar.splits:
        name = ""
    if name is None:
        found = ", ".join(repr(name) for name in sorted(tar.splits) if name) or "none"
        expected = "<split>/<class>/<image>" if whole else "<class>/<image>"
        raise ConfigError(f"{tar.path}: no split {split!r} in it; expected {expected}, found splits: {found}")
    classes = tar.splits[name]
    listing = list_images(f"{tar.path}{':' if name else ''}{name}", classes)
    spans = [classes[class_name][image] for class_name, image in (name.split("/") for name in listing.names)]
    return listing, TarImages(tar, np.array(spans, np.int64))


def _scan(stream: IO[bytes], path: Path) -> dict[str, Classes]:
    """Reads the headers of a tar and sorts what they name."""
    found: dict[tuple[str, ...], Classes] = {}  # by the folders above the class folder
    folders: list[tuple[str, ...]] = []
    ignored: list[str] = []
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte for each
            parts = _parts(member, path)
            if member.isdir():
                folders.append(parts)
            elif len(parts) < 2 or not is_image(parts[-1]) or any(map(is_hidden, parts)) or not _is_split(parts[:-2]):
                ignored.append("/".join(parts))
            else:
                images = found.setdefault(parts[:-2], {}).setdefault(parts[-2], {})
                images[parts[-1]] = (member.offset_data, member.size)  # the later of two of one name, as tar has it
        stream.seek(tar.offset)
        if stream.read(_BLOCK).strip(b"\0"):  # tarfile takes a damaged header for the end
            raise ConfigError(f"{path}: damaged at byte {tar.offset}; make or fetch it again")
    for parts in folders:
        if parts and parts[:-1] in found and not any(map(is_hidden, parts)):
            found[parts[:-1]].setdefault(parts[-1], {})
    report_ignored(path, ignored)
    splits: dict[str, Classes] = {}
    for above, classes in sorted(found.items()):
        name = above[-1] if above else ""
        if name in splits:
            raise ConfigError(f"{path}: holds two folders {name!r}, one of them {'/'.join(above)}; expected one")
        splits[name] = classes
    return splits


def _is_split(above: tuple[str, ...]) -> bool:
    """Whether these folders may stand above class folders: none, a split, or a split below one folder."""
    return len(above) < 2 or (len(above) == 2 and above[0] not in KNOWN_SPLITS)


def _parts(member: tarfile.TarInfo, path: Path) -> tuple[str, ...]:
    name = posixpath.normpath(member.name)
    if name.startswith("/") or name.split("/")[0] == "..":
        raise ConfigError(f"{path}: member {member.name!r} reaches outside the archive; make it again without")
    if not (member.isdir() or (member.isfile() and not member.issparse())):
        raise ConfigError(f"{path}: member {member.name!r} is a link, device or sparse file; expected plain files only")
    return tuple(part for part in name.split("/") if part != ".")

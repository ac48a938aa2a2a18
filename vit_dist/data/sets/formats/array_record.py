"""Sets of records that `vit-dist prepare` makes: ArrayRecord shards with an index of names and labels for each split.

A record is a msgpack map of the encoded image, its label and its name, so that a shard can be read without the index;
the index is what makes opening a large set quick. Which shard holds an id is arithmetic (`manifest.Split.ids`).
"""

import bisect
import errno
import logging
import os
import tempfile
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgpack
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.files import allow_open_files, first_line, is_remote
from vit_dist.data.progress_bar import counted
from vit_dist.data.sets import index, manifest
from vit_dist.data.sets.examples import FileSource, file_source, fingerprint
from vit_dist.data.sets.formats.listing import NoSplit, find_split
from vit_dist.data.sets.index import Index
from vit_dist.data.sets.manifest import Entry, Manifest

_log = logging.getLogger(__name__)
_NAMES = "surrogateescape"  # file names are bytes, not always UTF-8


def open_split(path: Path, split: str, data: config.Data) -> FileSource:
    """A split of a set. Raises `ConfigError` for one that is unfinished, incomplete, or lacks the split.

    The shards of a remote set are copied into the cache folder first: ArrayRecord reads files of mounted disks alone.
    """
    if not path.is_dir():
        raise ConfigError(f"data.path: {path} is a file; data.source=array_record needs the folder of a prepared set")
    whole = manifest.read_manifest(path)
    name = find_split(split, whole.shards)
    if name is None:
        raise NoSplit(f"data.path: no split {split!r} in {path}; found {', '.join(whole.shards)}")
    listed = read_index(path, whole, name)
    shards = whole.shards[name]
    folder = _fetch(path, whole, shards, data.cache_dir) if is_remote(path) else path
    for shard in shards:
        check_size(folder, shard)
    plan = whole.plan.splits[name]
    images = RecordImages([folder / shard.file for shard in shards], [plan.ids(i).start for i in range(len(shards))])
    allow_open_files([images], len(shards), path)
    return file_source(path / name, name, listed, images, plan.version)


class RecordImages:
    """Reads images out of shards, of which each is opened at its first read; what is pickled is the way to them.

    A reader may be used by many threads at once.
    """

    def __init__(self, files: Sequence[Path], starts: Sequence[int]) -> None:
        """`starts[s]` is the first id in `files[s]`."""
        self.files, self.starts = files, starts
        self._readers: list[Any] = [None] * len(files)
        self._lock = threading.Lock()

    def read(self, index: int) -> bytes:
        shard = bisect.bisect_right(self.starts, index) - 1
        reader = self._readers[shard]
        if reader is None:
            with self._lock:
                reader = self._readers[shard] = self._readers[shard] or open_reader(self.files[shard])
        try:
            return unpack(reader.read([index - self.starts[shard]])[0])["image"]
        except (RuntimeError, ValueError, LookupError) as error:  # a damaged record, or what is in it
            raise OSError(f"{self.files[shard].name} is damaged ({first_line(error)})") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordImages, (self.files, self.starts)


def pack(image: bytes, label: int, name: str) -> bytes:
    """A record."""
    return msgpack.packb({"image": image, "label": label, "name": name}, unicode_errors=_NAMES)


def unpack(record: bytes) -> dict[str, Any]:
    """The image, label and name of a record."""
    return msgpack.unpackb(record, unicode_errors=_NAMES)


def open_reader(file: Path) -> Any:
    """An `ArrayRecordReader` for single records in any order.

    Raises `OSError`, and `ConfigError` where the fault is not the file's: the process has too many open.
    """
    reader = ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():
        try:
            file.open("rb").close()  # it says why, which the library does not
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise ConfigError(
                    f"{file}: {error.strerror}; raise the limit (ulimit -n), or open fewer sets"
                ) from error
        raise OSError(f"{file.name} cannot be opened, or is no ArrayRecord file")
    return reader


class Writer:
    """Writes records to a file. Raises `ConfigError` where the disk refuses them."""

    def __init__(self, file: Path, shown_as: Path) -> None:
        self.shown_as = shown_as
        # Records on their own, so that any is read alone; no compression, which would gain nothing on images.
        self._writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")

    def write(self, record: bytes) -> None:
        self._call(self._writer.write, record)

    def close(self) -> None:
        self._call(self._writer.close)

    def _call(self, method: Any, *arguments: bytes) -> None:
        try:
            method(*arguments)
        except RuntimeError as error:
            raise ConfigError(f"{self.shown_as}: cannot be written ({first_line(error)})") from error


def check_size(folder: Path, file: Entry) -> None:
    """Raises `ConfigError` where a file of a set is missing or not of the size that the manifest says."""
    try:
        size = (folder / file.file).stat().st_size
    except FileNotFoundError:
        raise ConfigError(f"{folder / file.file}: missing, though the manifest lists it; copy or prepare it") from None
    if size != file.bytes:
        raise ConfigError(f"{folder / file.file}: {size} bytes, but the manifest says {file.bytes}; copy or prepare it")


def read_index(folder: Path, whole: Manifest, split: str) -> Index:
    """The index of a split. Raises `ConfigError` where it is damaged, or lists anything but the examples planned."""
    file = whole.indexes[split]
    check_size(folder, file)
    try:
        listed, _ = index.read(folder / file.file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{folder / file.file}: cannot be read ({error}); copy or prepare it again") from error
    plan = whole.plan.splits[split]
    if fingerprint_of(listed, plan.version) != plan.fingerprint:
        raise ConfigError(f"{folder / file.file}: does not list the examples of this set; copy or prepare it again")
    return listed


def fingerprint_of(listed: Index, version: str) -> str:
    """`fingerprint` of a prepared split that lists this."""
    return fingerprint(file_source("", "", listed, RecordImages((), ()), version))


def _fetch(path: Path, whole: Manifest, shards: Sequence[Entry], cache_dir: str | None) -> Path:
    """Copies the shards that are not there yet into the cache folder; returns where they lie."""
    folder = index.cache_folder(cache_dir) / f"records-{whole.digest[:24]}"
    missing = [shard for shard in shards if _size(folder / shard.file) != shard.bytes]
    if missing:
        size = sum(shard.bytes for shard in missing) / 2**30
        _log.info("copying %d shards, %.3g GiB, of %s into %s (data.cache_dir)", len(missing), size, path, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for shard in counted(missing, f"copying {path}"):
            with tempfile.TemporaryDirectory(dir=folder) as partial:
                copy = Path(partial) / shard.file
                remote = cast(Any, path / shard.file)
                remote.fs.get_file(remote.path, str(copy))
                check_size(copy.parent, shard)
                os.replace(copy, folder / shard.file)
    except OSError as error:
        raise ConfigError(f"data.cache_dir: the shards of {path} cannot be copied into {folder} ({error})") from error
    return folder


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1

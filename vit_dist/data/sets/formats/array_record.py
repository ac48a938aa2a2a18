"""Reads and writes the records that `vit-dist prepare` makes: ArrayRecord shards, and an index for each split.

A record is a msgpack map of the encoded image, its label and its name, so a shard can be read without the index. The
index makes a large set quick to open. The ids in a shard follow from their number (`manifest.Split.ids`).
array_record's own `ArrayRecordDataSource` is not used here: it is as fast, but it hides which shard an error comes from
and whether the process has too many files open, so that the code around it would be no shorter.
"""

import bisect
import errno
import logging
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgpack
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.files import allow_open_files, first_line, is_remote
from vit_dist.data.progress_bar import counted
from vit_dist.data.sets import index
from vit_dist.data.sets.examples import FileSource, file_source, fingerprint
from vit_dist.data.sets.formats.listing import NoSplit, find_split
from vit_dist.data.sets.index import Index
from vit_dist.data.sets.manifest import Entry, Manifest, read_manifest, stored_size

_log = logging.getLogger(__name__)
_NAMES = "surrogateescape"  # file names are bytes, not always UTF-8


def open_split(path: Path, split: str, data: config.Data) -> FileSource:
    """Opens a split of a prepared set. Raises `ConfigError` if the set is unfinished, incomplete or lacks the split.

    Copies the shards of a remote set into the cache folder first: ArrayRecord reads local files only.
    """
    if not path.is_dir():
        raise ConfigError(f"data.path: {path} is a file; data.source=array_record needs the folder of a prepared set")
    manifest = read_manifest(path)
    name = find_split(split, manifest.shards)
    if name is None:
        raise NoSplit(f"data.path: no split {split!r} in {path}; found {', '.join(manifest.shards)}")
    split_index = read_index(path, manifest, name)
    shards = manifest.shards[name]
    folder = _fetch(path, manifest, shards, data.cache_dir) if is_remote(path) else path
    for shard in shards:
        check_size(folder, shard)
    plan = manifest.plan.splits[name]
    images = RecordImages([folder / shard.file for shard in shards], [plan.ids(i).start for i in range(len(shards))])
    allow_open_files([images], len(shards), path)
    return file_source(path / name, name, split_index, images, plan.version)


class RecordImages:
    """The images in a split's shards. Opens a shard at its first read; pickles the paths only.

    Threads share the readers, which allow it.
    """

    def __init__(self, files: Sequence[Path], starts: Sequence[int]) -> None:
        """Takes the shards; `starts[s]` is the first id in `files[s]`."""
        self.files, self.starts = files, starts
        self._readers: list[Any] = [None] * len(files)
        self._lock = threading.Lock()

    def read(self, index: int) -> bytes:
        shard = bisect.bisect_right(self.starts, index) - 1
        with self._lock:
            reader = self._readers[shard] = self._readers[shard] or open_reader(self.files[shard])
        try:
            (record,) = reader.read([index - self.starts[shard]])
            return msgpack.unpackb(record, unicode_errors=_NAMES)["image"]
        except (RuntimeError, ValueError, LookupError) as error:  # a damaged record, or damaged content
            raise OSError(f"{self.files[shard].name} is damaged ({first_line(error)})") from error

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordImages, (self.files, self.starts)


def pack(image: bytes, label: int, name: str) -> bytes:
    """Returns the bytes of a record."""
    return msgpack.packb({"image": image, "label": label, "name": name}, unicode_errors=_NAMES)


def open_reader(file: Path) -> Any:
    """Returns an `ArrayRecordReader` for single records in any order.

    Raises `OSError` for a bad file, and `ConfigError` if the process has too many files open.
    """
    reader = ArrayRecordReader(str(file), "readahead_buffer_size:0,max_parallelism:0")
    if not reader.ok():
        try:
            file.open("rb").close()  # its error gives the reason, which the library does not
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise ConfigError(
                    f"{file}: {error.strerror}; raise the limit (ulimit -n), or open fewer sets"
                ) from error
        raise OSError(f"{file.name} cannot be opened, or is no ArrayRecord file")
    return reader


class Writer:
    """Writes records to a file. Raises `ConfigError`, naming `shown_as`, if they cannot be written."""

    def __init__(self, file: Path, shown_as: Path) -> None:
        self.shown_as = shown_as
        # One record per group, so that each can be read alone; no compression, which gains nothing on images.
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
    """Raises `ConfigError` if a file of a set is missing or differs in size from the manifest."""
    size = stored_size(folder / file.file)
    if size is None:
        raise ConfigError(f"{folder / file.file}: missing, though the manifest lists it; copy or prepare it")
    if size != file.bytes:
        raise ConfigError(f"{folder / file.file}: {size} bytes, but the manifest says {file.bytes}; copy or prepare it")


def read_index(folder: Path, manifest: Manifest, split: str) -> Index:
    """Returns the index of a split. Raises `ConfigError` if it is damaged or lists other examples than the plan."""
    file = manifest.indexes[split]
    check_size(folder, file)
    try:
        split_index, _ = index.read(folder / file.file)
    except index.READ_ERRORS as error:
        raise ConfigError(f"{folder / file.file}: cannot be read ({error}); copy or prepare it again") from error
    plan = manifest.plan.splits[split]
    if fingerprint_of(split_index, plan.version) != plan.fingerprint:
        raise ConfigError(f"{folder / file.file}: does not list the examples of this set; copy or prepare it again")
    return split_index


def fingerprint_of(split_index: Index, version: str) -> str:
    """Returns the `fingerprint` of a prepared split with this index."""
    return fingerprint(file_source("", "", split_index, RecordImages((), ()), version))


def _fetch(path: Path, manifest: Manifest, shards: Sequence[Entry], cache_dir: str | None) -> Path:
    """Copies missing shards of a remote set into the cache folder. Returns the folder of the copies."""
    folder = index.cache_folder(cache_dir) / f"records-{manifest.digest[:24]}"
    missing = [shard for shard in shards if stored_size(folder / shard.file) != shard.bytes]
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

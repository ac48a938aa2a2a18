"""The index of a split, in the order of ids: class names, example names, labels and, in a container, byte ranges.

The index of a large set takes minutes to build, from a million files or headers, and a moment to read. It is therefore
cached in a folder, under a digest of its description, and built again when the files have changed. All of it is
arrays, names included: a million Python strings would take as much memory as the images of a step.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.data.files import remove_partial, replacing
from vit_dist.data.npy import read_member
from vit_dist.paths import expanded

_log = logging.getLogger(__name__)
_FORMAT = 1  # raise it when the code gives another index for the same files: older cached ones are then ignored
_CACHED_FROM = 10_000  # examples; a smaller index is built faster than a person notices
_TEXT = ("utf-8", "surrogateescape")  # file names are bytes, not always UTF-8
READ_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)  # of `read`, for a damaged file


class Names(Sequence[str]):
    """Many strings packed into one array of bytes. Each access decodes one; `take` is in place of slices."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        """Takes all bytes, `text` `uint8 [bytes]`; name `i` ends before byte `ends[i]`, `int64 [N]`."""
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Packs strings."""
        encoded = [name.encode(*_TEXT) for name in names]
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        index = range(len(self))[index]  # a negative index counts from the end; one out of range raises `IndexError`
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].tobytes().decode(*_TEXT)

    def take(self, order: Sequence[int] | np.ndarray) -> "Names":
        """Returns the names with these indices, in this order."""
        return Names.of(self[int(index)] for index in order)


@dataclasses.dataclass(frozen=True)
class Index:
    """The examples of one split, in the order of ids.

    `labels` `int32 [N]` are indices into `class_names`; `names` identify examples to a person. In a container, `spans`
    `int64 [N, 3]` holds (file, offset, size) of each image, offset and size in bytes; elsewhere it is empty, `[0, 3]`.
    `split` is the split's name in the container, where that has to be searched for. `notes` are warnings to log
    whenever the index is opened.
    """

    class_names: tuple[str, ...]
    names: Names
    labels: np.ndarray
    spans: np.ndarray = dataclasses.field(default_factory=lambda: _spans(()))
    split: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def with_classes(self, class_names: tuple[str, ...], where: object) -> "Index":
        """Returns the same examples, labelled and ordered by the classes of the train split, `class_names`.

        Raises `ConfigError`, beginning with `where`, for a class that is not among them, and if two classes of either
        split share a name.
        """
        if class_names == self.class_names:
            return self
        check_distinct(class_names, where)
        check_distinct(self.class_names, where)
        numbers = {name: number for number, name in enumerate(class_names)}
        unknown = [name for name in self.class_names if name not in numbers]
        if unknown:
            raise ConfigError(f"{where}: class {unknown[0]!r} is not among the {len(class_names)} of the train split")
        missing = sorted(set(class_names) - set(self.class_names))
        if missing:
            _log.warning("%s: no images of %d classes of the train split, such as %r", where, len(missing), missing[0])
        table = np.array([numbers[name] for name in self.class_names], np.int32)
        labels = table[self.labels]
        order = np.argsort(labels, kind="stable")  # names stay in order within their class
        spans = self.spans[order] if len(self.spans) else self.spans
        names = self.names.take(order)
        return dataclasses.replace(self, class_names=class_names, names=names, labels=labels[order], spans=spans)


def _spans(rows: Sequence[tuple[int, int, int]] | np.ndarray) -> np.ndarray:
    return np.asarray(rows, np.int64).reshape(-1, 3)


def check_distinct(class_names: Sequence[str], where: object) -> None:
    """Raises `ConfigError` if two classes share a name. Call it before matching classes by name."""
    shared = [name for name, count in Counter(class_names).items() if count > 1]
    if shared:
        raise ConfigError(
            f"{where}: two classes are named {shared[0]!r}, and can be neither matched, chosen nor mixed by name; "
            "rename one"
        )


def sorted_index(
    class_names: Sequence[str],
    names: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    spans: Sequence[tuple[int, int, int]] | np.ndarray = (),
    notes: Sequence[str] = (),
) -> Index:
    """Sorts examples into the order of ids: by class, then name, then the order given.

    Args:
      class_names: the name of each class.
      names: the name of each example.
      labels: the class of each example.
      spans: (file, offset, size) of each example; empty where images are files of their own.
      notes: warnings to log whenever the index is opened.

    Returns:
      The index of the examples.
    """
    labels = np.asarray(labels, np.int32)
    order = np.array(sorted(range(len(names)), key=lambda i: (labels[i], names[i])), np.int64)
    sorted_spans = _spans(spans)[order] if len(spans) else _spans(())
    sorted_names = Names.of(names[i] for i in order)
    return Index(tuple(class_names), sorted_names, labels[order], sorted_spans, notes=tuple(notes))


def cached(what: str, stamp: str | None, cache_dir: str | None, build: Callable[[], Index]) -> Index:
    """Returns the index from the cache folder, or builds it and keeps it there.

    An index below `_CACHED_FROM` examples is not kept. A cache folder that cannot be written is logged and costs only
    time. If several processes of a host want the same index, one builds it and the others wait.

    Args:
      what: identifies the index: format, path and split.
      stamp: a text that changes when the files do; None if there is none, and the index is built each time.
      cache_dir: `data.cache_dir`.
      build: builds the index.
    """
    if stamp is None:
        return build()
    try:
        folder = cache_folder(cache_dir)
    except ConfigError as error:
        _log.warning("cannot keep the index of %s: %s", what, error)
        return build()
    file = folder / f"index-{hashlib.blake2b(f'{_FORMAT} {what}'.encode(*_TEXT), digest_size=12).hexdigest()}.npz"
    index = _read(file, stamp)
    if index is not None:
        return index
    with _lock(file.with_suffix(".lock"), what):
        index = _read(file, stamp)  # another process may have built it by now
        if index is None:
            index = build()
            if len(index) >= _CACHED_FROM:
                try:
                    remove_partial(folder, file.name)
                    write(file, index, stamp)
                    _log.info("kept the index of %s in %s", what, file)
                except OSError as error:
                    _log.warning("cannot keep the index of %s in %s (%s)", what, folder, error.strerror)
    return index


def cache_folder(cache_dir: str | None) -> Path:
    """Returns `data.cache_dir`, or the user's cache folder if it is None.

    Raises `ConfigError` if the home folder is unknown.
    """
    try:
        if cache_dir is not None:
            return expanded(cache_dir, "data.cache_dir")
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit_dist"
    except RuntimeError as error:  # a user without a home folder, or `~nobody`
        raise ConfigError(f"data.cache_dir: {cache_dir or 'not set'} ({error}); set it to a folder") from error


def write(file: Path, index: Index, stamp: str = "") -> None:
    """Writes an index atomically; equal indices give equal bytes. Raises `OSError`."""
    arrays: dict[str, Any] = {"stamp": np.frombuffer(stamp.encode(*_TEXT), np.uint8), "labels": index.labels}
    for name, values in (("class_names", index.class_names), ("split", (index.split,)), ("notes", index.notes)):
        packed = Names.of(values)
        arrays |= {f"{name}_text": packed.text, f"{name}_ends": packed.ends}
    arrays |= {"names_text": index.names.text, "names_ends": index.names.ends}
    if len(index.spans):
        arrays["spans"] = index.spans
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as stream:
        np.savez(stream, **arrays)


def read(file: Path) -> tuple[Index, str]:
    """Returns an index that `write` wrote, and its stamp. Raises one of `READ_ERRORS` if it cannot be read."""
    with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        arrays = {name: read_member(archive, name) for name in names}
        class_names, examples, (split,), notes = (
            Names(arrays[f"{name}_text"], arrays[f"{name}_ends"]) for name in ("class_names", "names", "split", "notes")
        )
        spans = arrays.get("spans", _spans(()))
        index = Index(tuple(class_names), examples, arrays["labels"], spans, split, tuple(notes))
        return index, arrays["stamp"].tobytes().decode(*_TEXT)


def _read(file: Path, stamp: str) -> Index | None:
    """Returns the index in `file`, or None if it is missing, damaged or has another stamp."""
    try:
        index, its_stamp = read(file)
    except FileNotFoundError:
        return None
    except READ_ERRORS as error:
        _log.warning("%s: cannot be read (%s); building that index again", file, error)
        return None
    return index if its_stamp == stamp else None


@contextlib.contextmanager
def _lock(lock: Path, what: str) -> Iterator[None]:
    """Holds a file lock among the processes of this host. Without one, on some file systems, work may be done twice."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        stream = open(lock, "w")
    except OSError:
        yield
        return
    with stream:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("waiting for another process that indexes %s", what)
                fcntl.flock(stream, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # a process that waits has the file open, and will find the index
                lock.unlink(missing_ok=True)

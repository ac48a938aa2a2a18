"""What a split holds, in the order of ids: class names, names, labels and, inside containers, where each image lies.

An index of a large set takes long to build, from a walk over a million files or headers, and a moment to read; so it
is kept in a cache folder, under the digest of what it was built from, and built anew when that has changed. Everything
in it is an array, the names too: a million of them as Python strings would take as much memory as the images of a step.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.data.files import replacing

_log = logging.getLogger(__name__)
_FORMAT = 1  # to be raised when an index of the same files would be another: one kept before is then not read
_KEPT_FROM = 10_000  # examples; a smaller index is built in less time than a person notices
_TEXT = ("utf-8", "surrogateescape")  # file names are bytes, not always UTF-8


class Names(Sequence[str]):
    """Many strings in one array of bytes. Reading one makes it anew."""

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        """`text` `uint8 [bytes]`; name `i` ends before `ends[i]`, `int64 [N]`."""
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        encoded = [name.encode(*_TEXT) for name in names]
        ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
        return cls(np.frombuffer(b"".join(encoded), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Names": ...
    def __getitem__(self, index: int | slice) -> "str | Names":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        number = range(len(self))[index]
        start = self.ends[number - 1] if number else 0
        return self.text[start : self.ends[number]].tobytes().decode(*_TEXT)

    def take(self, order: Sequence[int] | np.ndarray) -> "Names":
        """These names, in this order."""
        return Names.of(self[int(number)] for number in order)


@dataclasses.dataclass(frozen=True)
class Index:
    """The examples of one split, in the order of ids.

    `labels` `int32 [N]` index `class_names`; `names` say an example to a person. Inside containers, example `i` is the
    `size` bytes at `offset` of file `number`, where `spans[i]` is `(number, offset, size)`, `int64 [N, 3]`. `split` is
    what the split is called there, where that has to be looked for; `notes` are to be said whenever it is opened.
    """

    class_names: tuple[str, ...]
    names: Names
    labels: np.ndarray
    spans: np.ndarray | None = None
    split: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def with_classes(self, class_names: tuple[str, ...], where: object) -> "Index":
        """The same examples, labelled by the training split's classes and in their order.

        Raises `ConfigError` for a class that is not among them, and where two classes of either have one name.
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
        if np.all(labels[1:] >= labels[:-1]):
            return dataclasses.replace(self, class_names=class_names, labels=labels)
        order = np.argsort(labels, kind="stable")  # names stay in order within their class
        spans = None if self.spans is None else self.spans[order]
        names = self.names.take(order)
        return dataclasses.replace(self, class_names=class_names, names=names, labels=labels[order], spans=spans)


def check_distinct(class_names: Sequence[str], where: object) -> None:
    """Raises `ConfigError` where two classes have one name, to be called before they are told by their names."""
    doubled = [name for name, count in Counter(class_names).items() if count > 1]
    if doubled:
        raise ConfigError(
            f"{where}: two classes are named {doubled[0]!r}, and can be neither matched, chosen nor mixed by name; "
            "rename one"
        )


def in_order(
    class_names: Sequence[str],
    names: Sequence[str],
    labels: Sequence[int] | np.ndarray,
    spans: Sequence[tuple[int, int, int]] | np.ndarray | None = None,
    notes: Sequence[str] = (),
) -> Index:
    """An index of examples found in any order, in the order of ids: by class, then name, then as found."""
    found = np.asarray(labels, np.int32)
    order = np.array(sorted(range(len(names)), key=lambda number: (found[number], names[number])), np.int64)
    places = None if spans is None else np.asarray(spans, np.int64).reshape(-1, 3)[order]
    ordered = Names.of(names[number] for number in order)
    return Index(tuple(class_names), ordered, found[order], places, notes=tuple(notes))


def kept(what: str, stamp: str | None, cache_dir: str | None, build: Callable[[], Index]) -> Index:
    """The index that `build` makes, read from the cache folder where it was kept before.

    `what` says which index this is (path, split, format); `stamp` changes when what it was built from does, and None
    says that no such stamp can be had. One too small to be worth it is not kept, nor one that cannot be written, which
    is logged. Of several processes of a host that want the same one, the first builds it while the others wait.
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
    with _only_one(file.with_suffix(".lock"), what):
        index = _read(file, stamp)  # another process may have built it by now
        if index is None:
            index = build()
            if len(index) >= _KEPT_FROM:
                try:
                    write(file, index, stamp)
                    _log.info("kept the index of %s in %s", what, file)
                except OSError as error:
                    _log.warning("cannot keep the index of %s in %s (%s)", what, folder, error.strerror)
    return index


def cache_folder(cache_dir: str | None) -> Path:
    """`data.cache_dir`, or the user's own cache folder. Raises `ConfigError` where nobody knows the home folder."""
    try:
        if cache_dir is not None:
            return Path(cache_dir).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit_dist"
    except RuntimeError as error:  # a user without a home folder, or `~nobody`
        raise ConfigError(f"data.cache_dir: {cache_dir or 'not set'} ({error}); set it to a folder") from error


def write(file: Path, index: Index, stamp: str = "") -> None:
    """Writes an index whole or not at all; the same index makes the same bytes. Raises `OSError`."""
    arrays = {
        "stamp": np.frombuffer(stamp.encode(*_TEXT), np.uint8),
        "labels": index.labels,
        **{
            f"{name}_{part}": getattr(Names.of(values), part)
            for name, values in (("class_names", index.class_names), ("split", (index.split,)), ("notes", index.notes))
            for part in ("text", "ends")
        },
        "names_text": index.names.text,
        "names_ends": index.names.ends,
    }
    if index.spans is not None:
        arrays["spans"] = index.spans
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as stream:
        np.savez(stream, **arrays)


def read(file: Path) -> tuple[Index, str]:
    """An index that `write` wrote, and its stamp. Raises `OSError`, `ValueError`, `KeyError`, `EOFError` or
    `zipfile.BadZipFile`."""
    with file.open("rb") as stream, np.load(stream) as arrays:
        names = {
            name: Names(arrays[f"{name}_text"], arrays[f"{name}_ends"])
            for name in ("class_names", "names", "split", "notes")
        }
        index = Index(
            tuple(names["class_names"]),
            names["names"],
            arrays["labels"],
            arrays.get("spans"),
            "".join(names["split"]),
            tuple(names["notes"]),
        )
        return index, arrays["stamp"].tobytes().decode(*_TEXT)


def _read(file: Path, stamp: str) -> Index | None:
    """The index kept in `file`, if there is one of this stamp."""
    try:
        index, found = read(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("%s: cannot be read (%s); building that index again", file, error)
        return None
    return index if found == stamp else None


@contextlib.contextmanager
def _only_one(lock: Path, what: str) -> Iterator[None]:
    """Holds a lock of this host where the file system has such locks; else work may be done twice."""
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
            with contextlib.suppress(OSError):  # who waits for it holds the file open, and finds the index
                lock.unlink(missing_ok=True)

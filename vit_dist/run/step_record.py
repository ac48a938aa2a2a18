"""The record of a saved step: digests of its tensors and of its files, by which damage is told.

It is one more file of the step, `digests.json`, and is committed together with the others. Steps that were saved by an
earlier version have none. Of files in Orbax's own layout it holds sizes, and digests of the small ones; what the large
ones hold is known by the digests of the tensors (`mesh.digests`).
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vit_dist.config import ConfigError

FILE = "digests.json"
MARK = "digests"  # in Orbax's metadata: the step has a record, so that it is missed where it was deleted
_METADATA, _COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"
_SMALL = 1 << 20  # bytes
_METADATA_SECONDS = 60  # for them to be written
# Orbax writes the time of the commit after the record was made. Nothing reads it.
_LATE = "commit_timestamp_nsecs"


class Damaged(ConfigError):
    """A saved step is not what was saved.

    Attributes:
      reason: what is damaged, a file or a tensor, and how.
      missing: whether something is not there, as where a step is deleted while it is read.
    """

    def __init__(self, folder: Path, reason: str, *, missing: bool = False):
        super().__init__(f"{folder}: damaged: {reason}")
        self.reason, self.missing = reason, missing


@dataclasses.dataclass(frozen=True)
class Record:
    """What a step was saved as: `tensors`, from path to type, shape and digest, and `files`, from path to facts."""

    tensors: dict[str, str]
    files: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Returns what JSON can hold and `Record(**values)` takes back."""
        return dataclasses.asdict(self)


def steps_in(directory: Path) -> list[int]:
    """Returns the complete steps in a folder of checkpoints, in order; one that is not complete has a longer name."""
    return sorted(int(path.name) for path in directory.glob("[0-9]*") if path.name.isdecimal())


def bytes_of(folder: Path) -> int:
    """Returns the bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def write(folder: Path, committed: Path, tensors: Mapping[str, str]) -> None:
    """Writes the record of a step whose other files are complete.

    Args:
      folder: where the files are.
      committed: what the folder is about to be renamed to.
      tensors: as in `Record`.
    """
    files = {str(file.relative_to(folder)): _facts(file) for file in _files(folder)}
    files[_METADATA] = {"sha256": _sha256(_complete_metadata(folder))}
    for file in sorted(folder.glob(f"*/{_COMMITTED}")):  # Orbax writes the step's own last, with the same words
        text = file.read_text(encoding="utf-8").replace(str(file.parent), str(committed))
        files[_COMMITTED] = {"bytes": len(text.encode()), "sha256": _sha256(text.encode())}
    record = json.dumps({"tensors": dict(tensors), "files": files}, sort_keys=True)
    with open(folder / FILE, "w", encoding="utf-8") as stream:
        json.dump({"sha256": _sha256(record.encode()), "record": record}, stream)
        stream.flush()
        os.fsync(stream.fileno())


def read(folder: Path) -> Record | None:
    """Returns the record of a step; None if it was saved without one.

    Raises `Damaged` if the record, or Orbax's metadata, is not what was written, or there is no such step.
    """
    if not folder.is_dir():
        raise Damaged(folder, "it is missing", missing=True)
    try:
        with _readable(folder, FILE):
            sealed = json.loads((folder / FILE).read_bytes())
        record = sealed["record"]
        if _sha256(record.encode()) != sealed["sha256"]:
            raise Damaged(folder, f"{FILE} was changed")
        return Record(**json.loads(record))
    except Damaged as error:
        if error.missing and not metadata_of(folder).get(MARK):
            return None
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Damaged(folder, f"{FILE} does not hold what was written to it") from None


def check_files(folder: Path, record: Record) -> None:
    """Raises `Damaged` for a file of a step that is missing, has another size or, if it is small, other bytes."""
    for name, expected in record.files.items():
        file = folder / name
        with _readable(folder, name):
            found = {"sha256": _sha256(_metadata(file))} if name == _METADATA else _facts(file)
        if found.get("bytes") != expected.get("bytes"):
            raise Damaged(folder, f"{name} holds {found['bytes']} bytes of {expected['bytes']}")
        if found != expected:
            raise Damaged(folder, f"{name} was changed")


def metadata_of(folder: Path) -> dict[str, Any]:
    """Returns what the run saved with a step in Orbax's metadata. Raises `Damaged` if that cannot be read."""
    try:
        with _readable(folder, _METADATA):
            return dict(json.loads((folder / _METADATA).read_bytes())["custom_metadata"] or {})
    except Damaged:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Damaged(folder, f"{_METADATA} cannot be read") from None


def metrics_of(folder: Path) -> dict[str, float]:
    """Returns the metrics with which a step was saved; none if it was not evaluated.

    Raises `Damaged` if they cannot be read.
    """
    try:
        with _readable(folder, "metrics/metrics"):
            values = json.loads((folder / "metrics/metrics").read_bytes())
        return {name: float(value) for name, value in values.items()}
    except Damaged as error:
        if error.missing:
            return {}
        raise
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise Damaged(folder, "metrics/metrics cannot be read") from None


@contextlib.contextmanager
def _readable(folder: Path, name: str) -> Iterator[None]:
    """Turns errors of reading a file into `Damaged`, but not those that say nothing of it, such as a permission."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise Damaged(folder, f"{name} is missing", missing=True) from None
    except OSError as error:
        if error.errno not in (errno.EIO, errno.ESTALE):
            raise
        gone = error.errno == errno.ESTALE  # another host has deleted it
        raise Damaged(folder, f"{name} cannot be read ({error.strerror})", missing=gone) from error


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != FILE)


def _facts(file: Path) -> dict[str, Any]:
    """Returns the size of a file, and the digest of a small one."""
    with open(file, "rb") as stream:  # a network disk shows the size that another host wrote once the file is opened
        size = os.fstat(stream.fileno()).st_size
        return {"bytes": size} | ({"sha256": _sha256(stream.read())} if size <= _SMALL else {})


def _metadata(file: Path) -> bytes:
    """Returns Orbax's metadata of a step, without the time of the commit."""
    content = file.read_bytes()
    try:
        values = json.loads(content)
        values.pop(_LATE, None)
    except (ValueError, AttributeError, RecursionError):
        return content
    return json.dumps(values, sort_keys=True).encode()


def _complete_metadata(folder: Path) -> bytes:
    """Waits until Orbax, in another thread, has written the metadata of a step but for the commit; returns them."""
    end = time.monotonic() + _METADATA_SECONDS
    while time.monotonic() < end:
        with contextlib.suppress(Damaged):
            if metadata_of(folder).get(MARK):
                return _metadata(folder / _METADATA)
        time.sleep(0.01)
    raise TimeoutError(f"{folder / _METADATA}: was not written in {_METADATA_SECONDS} s")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

"""The work of `prepare`: the shards of a set are written side by side, each whole or not at all.

A shard is written in the folder of parts, takes its own name when it is whole, and is then noted; one that is noted is
never made again. What a killed run left of an unfinished one is removed by the next run.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.data.files import entries
from vit_dist.data.libraries import simplejpeg
from vit_dist.data.pictures.images import BadImage, decode, resize
from vit_dist.data.progress_bar import bar
from vit_dist.data.sets.examples import FileSource, Source
from vit_dist.data.sets.formats.array_record import Writer, pack
from vit_dist.data.sets.index import Names
from vit_dist.data.sets.manifest import PARTS, Entry, Plan, read_part, write_part

_log = logging.getLogger(__name__)
_JPEG_QUALITY, _JPEG_SAMPLING = 90, "420"
_JPEG_SIDE = 65_500  # pixels; the longest that JPEG has room for


@dataclasses.dataclass(frozen=True)
class Stored:
    """The images of a split as they are stored: as `jpeg`, as `raw` (PPM, or PGM without colour), or None: untouched.

    `resize` is the length in pixels that a longer short side is brought to.
    """

    source: Source
    resize: int | None
    encode: str | None

    @classmethod
    def of(cls, source: Source, resize: int | None, encode: str | None) -> "Stored":
        """With the encoding that is asked for, or the one that loses least for what is asked for."""
        if isinstance(source, FileSource):
            return cls(source, resize, encode or ("jpeg" if resize else None))
        if source.images.shape[-1] not in (1, 3):
            raise ConfigError(f"the images have {source.images.shape[-1]} channels; expected 1 (gray) or 3 (RGB)")
        return cls(source, resize, encode or "raw")

    @property
    def version(self) -> str:
        """How the pixels differ from those of the source of the source: see `FileSource.version`."""
        before = self.source.version if isinstance(self.source, FileSource) else ""
        resized = f"resize={self.resize}" if self.resize else ""
        encoded = ""
        if self.encode == "jpeg":
            encoded = f"encode=jpeg:{_JPEG_QUALITY}:{_JPEG_SAMPLING}"
        elif self.encode == "raw" and isinstance(self.source, FileSource):  # of pixels, raw ones are the same
            encoded = "encode=raw"
        return " ".join(filter(None, (before, resized, encoded)))

    def original(self, number: int) -> bytes:
        """What the source has. Raises `OSError`."""
        return self.source.read(number) if isinstance(self.source, FileSource) else raw(self.source.images[number])

    def image(self, number: int) -> bytes:
        """What is stored of an image. Raises `OSError`, and `BadImage` where it has to be decoded and cannot be."""
        if isinstance(self.source, FileSource):
            original = self.source.read(number)
            if self.encode is None:
                return original
            image = without_colour(decode(original, 3))
        else:
            original, image = b"", self.source.images[number]
        smaller = image if self.resize is None else shortened(image, self.resize)
        if self.encode == "raw":
            return raw(smaller)
        if smaller is image and original.startswith(b"\xff\xd8"):
            return original  # encoding it once more would only lose
        return jpeg(smaller)


def shortened(image: np.ndarray, short_side: int) -> np.ndarray:
    """`uint8 [H, W, C]` of which the shorter side is at most `short_side`, in the same proportions."""
    scale = short_side / min(image.shape[:2])
    return image if scale >= 1 else resize(image, (round(image.shape[0] * scale), round(image.shape[1] * scale)))


def without_colour(image: np.ndarray) -> np.ndarray:
    """`uint8 [H, W, 3]` -> `[H, W, 1]` where there is no colour in it."""
    return image[..., :1] if (image == image[..., :1]).all() else image


def raw(image: np.ndarray) -> bytes:
    """`uint8 [H, W, C]` -> a PPM file (P6), of one channel a PGM file (P5)."""
    height, width, channels = image.shape
    return f"P{5 if channels == 1 else 6}\n{width} {height}\n255\n".encode() + image.tobytes()


def jpeg(image: np.ndarray) -> bytes:
    """`uint8 [H, W, C]` -> a JPEG file of quality 90, 4:2:0. Raises `BadImage` for one too large."""
    if max(image.shape[:2]) > _JPEG_SIDE:
        raise BadImage(f"{image.shape[0]}x{image.shape[1]} pixels, a JPEG has at most {_JPEG_SIDE} on a side")
    kind = ("GRAY", "Gray") if image.shape[2] == 1 else ("RGB", _JPEG_SAMPLING)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), _JPEG_QUALITY, *kind)


class Shard(NamedTuple):
    """One that is to be made."""

    split: str
    ids: range
    file: str


@dataclasses.dataclass(frozen=True)
class _Work:
    place: Path
    plan: Plan
    stored: dict[str, Stored]
    names: dict[str, Names]
    keep_bad: bool
    stopped: threading.Event


class _Stopped(Exception):
    """Another shard failed, or the user wants to leave."""


def make(
    place: Path,
    plan: Plan,
    shards: Sequence[Shard],
    stored: dict[str, Stored],
    names: dict[str, Names],
    keep_bad: bool,
    workers: int,
) -> None:
    """Makes those of the shards that are not noted as finished, `workers` at a time.

    `stored` and `names` are by split. With `keep_bad` an image that does not decode is stored as it is, and counted;
    without resizing or encoding none is decoded. Raises `ConfigError` for one that does not decode otherwise, for one
    that cannot be read, and for a disk that is full.
    """
    _remove_leftovers(place, {shard.file for shard in shards})
    todo = [shard for shard in shards if read_part(place, plan, shard.file) is None]
    if 0 < len(todo) < len(shards):
        _log.info("%s: going on, %d of %d shards are there", place, len(shards) - len(todo), len(shards))
    work = _Work(place, plan, stored, names, keep_bad, threading.Event())
    with bar() as shown, ThreadPoolExecutor(workers) as pool:
        task = shown.add_task(f"preparing {place}", total=sum(len(shard.ids) for shard in todo))
        jobs = [pool.submit(_make, work, shard, lambda: shown.advance(task)) for shard in todo]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException as error:  # Ctrl-C too
            work.stopped.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, FileNotFoundError):
                raise ConfigError(
                    f"{error.filename}: is gone; did another `prepare` finish the set meanwhile? run it again"
                ) from error
            raise


def _make(work: _Work, shard: Shard, advance: Callable[[], None]) -> None:
    """Writes one shard, and notes it when it is whole."""
    bad = 0
    with _partial(work.place, shard.file) as partial:
        file = Path(partial.name)
        writer = Writer(file, work.place / shard.file)
        labels, names = work.stored[shard.split].source.labels, work.names[shard.split]
        for number in shard.ids:
            if work.stopped.is_set():
                raise _Stopped
            image, is_bad = _image(work, shard.split, number)
            writer.write(pack(image, int(labels[number]), names[number]))
            bad += is_bad
            advance()
        writer.close()
        size, digest = measure(file)
        os.fsync(partial.fileno())
        os.chmod(file, 0o644)  # a temporary file is its owner's alone
        os.replace(file, work.place / shard.file)
    write_part(work.place, work.plan, Entry(shard.file, len(shard.ids), size, digest, bad))


def _image(work: _Work, split: str, number: int) -> tuple[bytes, bool]:
    """What is stored of an image, and whether it is a bad one."""
    stored = work.stored[split]
    name = stored.source.name(number)
    try:
        try:
            return stored.image(number), False
        except BadImage as error:
            if not work.keep_bad:
                raise ConfigError(
                    f"{name}: {error}; repair or remove it, or set --on-bad=skip to store it as it is"
                ) from error
            _log.warning("%s: %s; stored as it is", name, error)
            return stored.original(number), True
    except OSError as error:
        # Not for `keep_bad`: there is nothing to store, and a network's bad moment must not make another set.
        raise ConfigError(f"{name}: cannot be read ({error}); repair or remove it, or try again") from error


def measure(file: Path) -> tuple[int, str]:
    """The size of a file in bytes, and the SHA-256 of its content."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), digest


@contextlib.contextmanager
def _partial(place: Path, file: str) -> Iterator[IO[bytes]]:
    """A new file beside the parts, locked for as long as somebody writes it; removed where that fails."""
    with tempfile.NamedTemporaryFile(dir=place / PARTS, prefix=f"{file}.", suffix=".tmp", delete=False) as partial:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield partial
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial.name)
            raise


def _remove_leftovers(place: Path, files: set[str]) -> None:
    """Removes what killed runs left of these shards: the unfinished files that nobody holds a lock on."""
    for name, _ in entries(place / PARTS):
        if name.endswith(".tmp") and name.rsplit(".", 2)[0] in files:
            with contextlib.suppress(OSError), open(place / PARTS / name, "rb") as partial:
                fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused where a live one holds it
                os.unlink(partial.name)

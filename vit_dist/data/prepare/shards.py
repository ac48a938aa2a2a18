"""Writes the shards of a set for `prepare`, several at the same time, each atomically.

A shard is written under a temporary name in `WORK_FOLDER`, is renamed when it is complete, and is then recorded there
as finished; a recorded shard is never written again. The next run removes the temporary files of a killed run.
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
from vit_dist.data.libraries import simplejpeg
from vit_dist.data.pictures.images import BadImage, decode, resize
from vit_dist.data.progress_bar import bar
from vit_dist.data.sets.examples import FileSource, Source
from vit_dist.data.sets.formats.array_record import Writer, pack
from vit_dist.data.sets.index import Names
from vit_dist.data.sets.manifest import WORK_FOLDER, Entry, Plan, read_entry, write_entry
from vit_dist.schema import one_of

_log = logging.getLogger(__name__)
_JPEG_QUALITY, _JPEG_SAMPLING = 90, "420"
_JPEG_SIDE = 65_500  # pixels; the longest side that libjpeg encodes


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """How `prepare` stores images. Raises `ConfigError` for an unknown `encode`.

    `resize`: the short side in pixels to which larger images are reduced; None: images keep their size.
    `encode`: `jpeg` (quality 90, 4:2:0), or `raw` (PPM, or PGM for gray); None: encoded images are stored unchanged, or
        as `jpeg` if `resize` is set, and pixels are stored as `raw`.
    `keep_bad`: store an image that does not decode unchanged, and count it, instead of ending with an error.
    """

    resize: int | None = None
    encode: str | None = None
    keep_bad: bool = False

    def __post_init__(self) -> None:
        if self.encode is not None:
            one_of("ImageOptions.encode", self.encode, ("jpeg", "raw"))


@dataclasses.dataclass(frozen=True)
class StoredImages:
    """The images of a split, encoded as the options say. Here `options.encode` None means unchanged."""

    source: Source
    options: ImageOptions

    @classmethod
    def of(cls, source: Source, options: ImageOptions) -> "StoredImages":
        """Chooses the encoding if the options do not. Raises `ConfigError` for pixels that are neither gray nor RGB."""
        if isinstance(source, FileSource):
            default = "jpeg" if options.resize else None
        elif source.images.shape[-1] in (1, 3):
            default = "raw"
        else:
            raise ConfigError(f"the images have {source.images.shape[-1]} channels; expected 1 (gray) or 3 (RGB)")
        return cls(source, dataclasses.replace(options, encode=options.encode or default))

    @property
    def version(self) -> str:
        """Describes how the pixels differ from those of the original source; see `FileSource.version`."""
        before = self.source.version if isinstance(self.source, FileSource) else ""
        resized = f"resize={self.options.resize}" if self.options.resize else ""
        encoded = ""
        if self.options.encode == "jpeg":
            encoded = f"encode=jpeg:{_JPEG_QUALITY}:{_JPEG_SAMPLING}"
        elif self.options.encode == "raw" and isinstance(self.source, FileSource):  # else the pixels are the source's
            encoded = "encode=raw"
        return " ".join(filter(None, (before, resized, encoded)))

    def original(self, number: int) -> bytes:
        """Returns an image as the source has it, pixels as a raw file. Raises `OSError` if it cannot be read."""
        source = self.source
        return source.read(number) if isinstance(source, FileSource) else encode_raw(source.images[number])

    def encoded(self, number: int) -> bytes:
        """Returns an image as it is stored. Raises `OSError` if it cannot be read, `BadImage` if it does not decode."""
        if isinstance(self.source, FileSource):
            original = self.source.read(number)
            if self.options.encode is None:
                return original
            image = drop_equal_channels(decode(original, 3))
        else:
            original, image = b"", self.source.images[number]
        smaller = image if self.options.resize is None else limit_short_side(image, self.options.resize)
        if self.options.encode == "raw":
            return encode_raw(smaller)
        if smaller is image and original.startswith(b"\xff\xd8"):
            return original  # a JPEG of the right size: encoding it again would only lose quality
        return encode_jpeg(smaller)


def limit_short_side(image: np.ndarray, short_side: int) -> np.ndarray:
    """Shrinks `uint8 [H, W, C]` in proportion until its shorter side is at most `short_side` pixels."""
    scale = short_side / min(image.shape[:2])
    return image if scale >= 1 else resize(image, (round(image.shape[0] * scale), round(image.shape[1] * scale)))


def drop_equal_channels(image: np.ndarray) -> np.ndarray:
    """Returns `uint8 [H, W, 3]` as `[H, W, 1]` if its channels are equal, so that gray images are stored as gray."""
    return image[..., :1] if (image == image[..., :1]).all() else image


def encode_raw(image: np.ndarray) -> bytes:
    """Encodes `uint8 [H, W, C]` as a PPM file (P6), or as a PGM file (P5) if it has one channel."""
    height, width, channels = image.shape
    return f"P{5 if channels == 1 else 6}\n{width} {height}\n255\n".encode() + image.tobytes()


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encodes `uint8 [H, W, C]` as a JPEG file of quality 90, 4:2:0. Raises `BadImage` if the image is too large."""
    if max(image.shape[:2]) > _JPEG_SIDE:
        raise BadImage(f"{image.shape[0]}x{image.shape[1]} pixels, a JPEG has at most {_JPEG_SIDE} on a side")
    kind = ("GRAY", "Gray") if image.shape[2] == 1 else ("RGB", _JPEG_SAMPLING)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), _JPEG_QUALITY, *kind)


class Shard(NamedTuple):
    """A shard to write: its file's name, and its examples as the ids, images and names of a split."""

    file: str
    ids: range
    images: StoredImages
    names: Names


class _Stopped(Exception):
    """Another shard failed, or the user pressed Ctrl-C."""


def write_shards(folder: Path, plan: Plan, shards: Sequence[Shard], workers: int) -> None:
    """Writes the shards that are not recorded as finished.

    Args:
      folder: of the set.
      plan: of the set; finished shards of another plan are refused.
      shards: the shards that should exist at the end.
      workers: how many threads, each of which writes a shard at a time.

    Raises:
      ConfigError: an image cannot be read, or does not decode and is not to be kept; a finished shard belongs to
        another plan; or the disk is full.
    """
    _remove_leftovers(folder, {shard.file for shard in shards})
    unfinished = [shard for shard in shards if read_entry(folder, plan, shard.file) is None]
    if 0 < len(unfinished) < len(shards):
        _log.info("%s: resuming, %d of %d shards are finished", folder, len(shards) - len(unfinished), len(shards))
    stopped = threading.Event()

    def advance() -> None:
        if stopped.is_set():
            raise _Stopped
        progress.advance(task)

    with bar() as progress, ThreadPoolExecutor(workers) as pool:
        task = progress.add_task(f"preparing {folder}", total=sum(len(shard.ids) for shard in unfinished))
        written = [pool.submit(_write_shard, folder, plan, shard, advance) for shard in unfinished]
        try:
            for future in as_completed(written):
                future.result()
        except BaseException as error:  # Ctrl-C too
            stopped.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(error, FileNotFoundError):
                raise ConfigError(
                    f"{error.filename}: is gone; did another `prepare` finish the set meanwhile? run it again"
                ) from error
            raise


def _write_shard(folder: Path, plan: Plan, shard: Shard, advance: Callable[[], None]) -> None:
    """Writes a shard, then records it as finished. Calls `advance` before each example, and stops if that raises."""
    images, bad = shard.images, 0
    with _partial(folder, shard.file) as partial:
        file = Path(partial.name)
        writer = Writer(file, folder / shard.file)
        for number in shard.ids:
            advance()
            image, is_bad = _encoded(images, number)
            writer.write(pack(image, int(images.source.labels[number]), shard.names[number]))
            bad += is_bad
        writer.close()
        size, digest = measure(file)
        os.fsync(partial.fileno())
        os.chmod(file, 0o644)  # only the owner may read a temporary file
        os.replace(file, folder / shard.file)
    write_entry(folder, plan, Entry(shard.file, len(shard.ids), size, digest, bad))


def _encoded(images: StoredImages, number: int) -> tuple[bytes, bool]:
    """Returns an image as it is stored, and whether it is bad."""
    name = images.source.name(number)
    try:
        try:
            return images.encoded(number), False
        except BadImage as error:
            if not images.options.keep_bad:
                raise ConfigError(
                    f"{name}: {error}; repair or remove it, or set --on-bad=skip to store it as it is"
                ) from error
            _log.warning("%s: %s; stored as it is", name, error)
            return images.original(number), True
    except OSError as error:
        # `keep_bad` does not apply: there is nothing to store, and the set must not depend on the state of a network.
        raise ConfigError(f"{name}: cannot be read ({error}); repair or remove it, or try again") from error


def measure(file: Path) -> tuple[int, str]:
    """Returns the size of a file in bytes and the SHA-256 of its content."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), digest


@contextlib.contextmanager
def _partial(folder: Path, file: str) -> Iterator[IO[bytes]]:
    """Yields a new temporary file for a shard, locked during the `with` block; then removes it, if not renamed."""
    with tempfile.NamedTemporaryFile(
        dir=folder / WORK_FOLDER, prefix=f"{file}.", suffix=".tmp", delete=False
    ) as partial:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield partial
        finally:
            Path(partial.name).unlink(missing_ok=True)


def _remove_leftovers(folder: Path, files: set[str]) -> None:
    """Removes the temporary files that killed runs left of these shards, which no process has locked."""
    for file in (folder / WORK_FOLDER).glob("*.tmp"):
        if file.name.rsplit(".", 2)[0] in files:
            with contextlib.suppress(OSError), open(file, "rb") as partial:
                fcntl.flock(partial, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if a live process holds the lock
                file.unlink()

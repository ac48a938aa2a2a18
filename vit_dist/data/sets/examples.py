"""The examples of one split: their labels, their class names, and their images as pixels or as encoded files.

An `ArraySource` holds pixels, and a batch of it is one gather; a `FileSource` reads encoded images one by one from
wherever they lie. Which container a set came in changes nothing else: an example's id is its index in class-then-name
order (for sets that are one array, the order of the array).
"""

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.data.files import File, printable
from vit_dist.data.sets.index import Index, Names

_log = logging.getLogger(__name__)
_DIGEST_RUN = 1 << 24  # bytes of pixels that are digested at a time
_DIGEST_LIMIT = 1 << 32
PIXELS = "pixels:"  # before a digest that covers them


class Images(Protocol):
    """The encoded images of a split, by number. Safe to call from many threads; can be pickled."""

    def read(self, index: int) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Examples as pixels: `images` `uint8 [N, H, W, C]`, `labels` `int32 [N]`.

    `parts` are the size and weight of each set in a mixture by weight, in the order of ids; else there are none.
    `split` is the name under which the split was found, where a set calls `test` what was asked for as `val`.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    parts: tuple[tuple[int, float], ...] = ()
    split: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"example {index}"


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Examples as encoded images: `labels` `int32 [N]`; `names` lie below `where`, or are whole where it is empty.

    `version` tells sets apart whose names and labels are the same and whose pixels are not: of images that `prepare`
    has made smaller it says how. `parts` and `split` are as in `ArraySource`.
    """

    where: str
    names: Names
    labels: np.ndarray
    class_names: tuple[str, ...]
    images: Images
    version: str = ""
    parts: tuple[tuple[int, float], ...] = ()
    split: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return printable(f"{self.where}/{self.names[index]}" if self.where else self.names[index])

    def read(self, index: int) -> bytes:
        """The encoded bytes. Raises `OSError` where the file cannot be read."""
        return self.images.read(index)


Source = ArraySource | FileSource


@dataclasses.dataclass(frozen=True)
class SpanImages:
    """Reads images that lie inside `files`; image `i` where `spans[i]` says: `int64 [N, 3]`, file, offset and size."""

    files: tuple[File, ...]
    spans: np.ndarray

    def read(self, index: int) -> bytes:
        number, offset, size = self.spans[index].tolist()
        return self.files[number].read(offset, size)


def file_source(where: object, split: str, index: Index, images: Images, version: str = "") -> FileSource:
    """The examples of an index, read by `images`; what its making had to say is said."""
    for note in index.notes:
        _log.warning("%s", note)
    return FileSource(str(where), index.names, index.labels, index.class_names, images, version, split=split)


def check_labels(source: Source, num_classes: int) -> None:
    """Raises `ConfigError` naming the first example whose label is not in `[0, num_classes)`."""
    wrong = np.flatnonzero((source.labels < 0) | (source.labels >= num_classes))
    if len(wrong):
        raise ConfigError(
            f"model.num_classes: {source.name(wrong[0])} (id {wrong[0]}) has label {source.labels[wrong[0]]}, which is "
            f"not in 0..{num_classes - 1}; {len(wrong)} of {len(source)} labels are out of range"
        )


def distinct_names(class_names: Sequence[str]) -> list[str]:
    """The names, those that several classes share with the class's number behind: `crane (134)`, `crane (517)`.

    Where a class has that very name, the number stands behind more than once.
    """
    counts, distinct = Counter(class_names), []
    for number, name in enumerate(class_names):
        if counts[name] > 1:
            while name in counts:
                name += f" ({number})"
        distinct.append(name)
    return distinct


def fingerprint(source: Source) -> str:
    """A short digest of a split, to tell sets apart: count, labels, class names, mixture, and the examples.

    Files are told by their names alone. Examples in memory are told by their pixels, at about a gigabyte a second; of
    more than `_DIGEST_LIMIT` bytes of them, by those of one example in two, three or as many as it takes. Their digest
    begins with `PIXELS`.
    """
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(source, FileSource):
        parts: Sequence[bytes | np.ndarray] = [source.names.text, source.names.ends, source.version.encode()]
    else:
        parts = [str(source.images.shape).encode(), _pixel_digest(source.images)]
    for part in (str(len(source)).encode(), "\n".join(source.class_names).encode("utf-8", "surrogateescape"), *parts):
        digest.update(part.tobytes() if isinstance(part, np.ndarray) else part)
        digest.update(b"\0")
    digest.update(source.labels.astype("<i4").tobytes())
    digest.update(repr(source.parts).encode())
    return ("" if isinstance(source, FileSource) else PIXELS) + digest.hexdigest()


def _pixel_digest(images: np.ndarray) -> bytes:
    """The digest of images `uint8 [N, H, W, C]`, read in runs: they may be mapped from a file larger than memory."""
    digest = hashlib.sha256()  # twice as quick as blake2b where the processor has instructions for it
    images = images[:: max(1, -(-images.nbytes // _DIGEST_LIMIT))]
    run = max(1, _DIGEST_RUN // max(1, images[:1].nbytes))
    for start in range(0, len(images), run):
        digest.update(images[start : start + run].tobytes())
    return digest.digest()

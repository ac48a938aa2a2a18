"""The examples of one split: labels, class names, and images as pixels or as encoded files.

An `ArraySource` holds pixels, so a batch is one gather; a `FileSource` reads encoded images one at a time from any
container. The container changes nothing else: an example's id is its index in class-then-name order or, for a set that
is one array, its index in the array.
"""

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.data.files import File
from vit_dist.data.sets.index import Index, Names
from vit_dist.escape import printable

_log = logging.getLogger(__name__)
_DIGEST_CHUNK = 1 << 24  # bytes of pixels that are digested at a time
_DIGEST_LIMIT = 1 << 32  # bytes of pixels; of a larger set only some images are digested
PIXELS = "pixels:"  # prefix of a fingerprint that covers pixels


class Images(Protocol):
    """The encoded images of a split, by index. Threads may share it, and it can be pickled."""

    def read(self, index: int) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Examples as pixels: `images` `uint8 [N, H, W, C]`, `labels` `int32 [N]`.

    In a mixture by weight, `mixture` holds the (size, weight) of each set in the order of ids; otherwise it is empty.
    `split` is the split's name in the set, which may be `test` where the config asked for `val`.
    """

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    mixture: tuple[tuple[int, float], ...] = ()
    split: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return f"example {index}"


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Examples as encoded images: `labels` `int32 [N]`; `names` are relative to `where`, or full if it is empty.

    `version` distinguishes sets with the same names and labels but other pixels: for images that `prepare` has made
    smaller it describes how. `mixture` and `split` are as in `ArraySource`.
    """

    where: str
    names: Names
    labels: np.ndarray
    class_names: tuple[str, ...]
    images: Images
    version: str = ""
    mixture: tuple[tuple[int, float], ...] = ()
    split: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return printable(f"{self.where}/{self.names[index]}" if self.where else self.names[index])

    def read(self, index: int) -> bytes:
        """Returns the encoded image. Raises `OSError` if it cannot be read."""
        return self.images.read(index)


Source = ArraySource | FileSource


@dataclasses.dataclass(frozen=True)
class SpanImages:
    """Images that are byte ranges of `files`. `spans` `int64 [N, 3]` holds (file, offset, size) of each."""

    files: tuple[File, ...]
    spans: np.ndarray

    def read(self, index: int) -> bytes:
        file, offset, size = self.spans[index].tolist()
        return self.files[file].read(offset, size)


def file_source(where: object, split: str, index: Index, images: Images, version: str = "") -> FileSource:
    """Returns the examples of `index`, read through `images`, and logs the index's notes as warnings."""
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
    """Appends the class's number to names that several classes share: `crane (134)`, `crane (517)`.

    Appends it again where another class has that very name already.
    """
    counts, distinct = Counter(class_names), []
    for number, name in enumerate(class_names):
        if counts[name] > 1:
            while name in counts:
                name += f" ({number})"
        distinct.append(name)
    return distinct


def fingerprint(source: Source) -> str:
    """Returns a short digest of a split: its size, labels, class names, mixture and examples.

    Of files it covers the names only. Of examples in memory it covers the pixels, at about a gigabyte a second, and
    begins with `PIXELS`; beyond `_DIGEST_LIMIT` bytes it covers every second, third or n-th example.
    """
    digest = hashlib.blake2b(digest_size=8)
    if isinstance(source, FileSource):
        contents: Sequence[bytes | np.ndarray] = [source.names.text, source.names.ends, source.version.encode()]
    else:
        contents = [str(source.images.shape).encode(), _pixel_digest(source.images)]
    class_names = "\n".join(source.class_names).encode("utf-8", "surrogateescape")
    for content in (str(len(source)).encode(), class_names, *contents):
        digest.update(content.tobytes() if isinstance(content, np.ndarray) else content)
        digest.update(b"\0")
    digest.update(source.labels.astype("<i4").tobytes())
    digest.update(repr(source.mixture).encode())
    return ("" if isinstance(source, FileSource) else PIXELS) + digest.hexdigest()


def _pixel_digest(images: np.ndarray) -> bytes:
    """Digests images `uint8 [N, H, W, C]` in chunks: they may be mapped from a file larger than memory."""
    digest = hashlib.sha256()  # twice as fast as blake2b on processors with instructions for it
    images = images[:: max(1, -(-images.nbytes // _DIGEST_LIMIT))]
    size = max(1, _DIGEST_CHUNK // max(1, images[:1].nbytes))
    for start in range(0, len(images), size):
        digest.update(images[start : start + size].tobytes())
    return digest.digest()

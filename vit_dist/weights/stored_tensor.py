"""A tensor that lies in a file: its name, shape and dtype, and how a slice of it is read.

A slice is copied block by block from a file that is mapped into memory for one block only, so a process holds no more
of a file than the slices that it asked for. What a file says about itself is checked before memory is allocated for it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from vit_dist.config import ConfigError

FETCH_AGAIN = "fetch the file again, as it may be incomplete, or save it again"
_MOST_AXES = 32
_BLOCK_BYTES = 16 << 20  # of a file, mapped at a time
_LONGEST_NAME = 500


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in `file`. `load` returns all of it: mapped into memory, or decompressed if it is stored compressed.

    Raises `ConfigError` if name or shape cannot be those of a tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    load: Callable[[], np.ndarray]

    def __post_init__(self) -> None:
        where = f"{self.file}: tensor '{printed(self.name)}'"
        if not self.name or len(self.name) > _LONGEST_NAME or not self.name.isprintable():
            raise ConfigError(f"{where}: expected a name of 1 to {_LONGEST_NAME} printable characters; rename it")
        if len(self.shape) > _MOST_AXES:
            raise ConfigError(f"{where} has {len(self.shape)} axes, more than {_MOST_AXES}; {FETCH_AGAIN}")
        # numpy refuses an empty array, too, if its other axes are too long
        sizes_fit = all(0 <= size < 2**63 for size in self.shape)
        if not sizes_fit or math.prod(size or 1 for size in self.shape) * self.dtype.itemsize >= 2**63:
            raise ConfigError(f"{where} has the shape {printed(self.shape)}, which no tensor has; {FETCH_AGAIN}")

    @property
    def nbytes(self) -> int:
        """The bytes that the tensor takes in memory."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Returns a copy of the slice `index` in C order, of all axes that it does not name; of the tensor for `()`.

        Raises `ConfigError` if the file was removed, cut or damaged since it was opened.
        """
        stored = self.load()[index]
        values = np.empty(stored.shape, stored.dtype)
        if isinstance(stored, np.memmap):
            axis = int(np.argmax(np.abs(stored.strides)))  # along which a block lies together in the file
            size = max(1, _BLOCK_BYTES // abs(stored.strides[axis]))
            for start in range(0, stored.shape[axis], size):
                block = (slice(None),) * axis + (slice(start, start + size),)
                values[block] = self.load()[index][block]  # pages stay in memory as long as their mapping
        else:
            values[...] = stored
        return values.view(self.dtype)


def stubs(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StoredTensor]:
    """Returns tensors of float32 by name that have these shapes and no numbers yet."""
    return in_memory({name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()})


def in_memory(arrays: Mapping[str, np.ndarray]) -> dict[str, StoredTensor]:
    """Returns arrays by name as tensors of a file that is not written."""
    return {
        name: StoredTensor(name, array.shape, array.dtype, Path("memory"), functools.partial(np.asarray, array))
        for name, array in arrays.items()
    }


def map_array(
    file: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype, order: Literal["C", "F"] = "C"
) -> np.ndarray:
    """Returns an array at `offset` bytes of a file, mapped into memory until it is no longer referenced."""
    if 0 in shape:  # no bytes can be mapped
        return np.empty(shape, dtype)
    try:
        return np.memmap(file, dtype, "r", offset, shape, order)
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from error


def unreadable(where: object, error: Exception) -> ConfigError:
    """Returns the error of a file, or of a part of it, that another error kept from being read."""
    return ConfigError(f"{where}: cannot be read ({reason(error)}); {FETCH_AGAIN}")


def reason(error: Exception) -> str:
    """Returns the message of an error in one line, without the path that the system adds to its own."""
    return printed(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def printed(value: object, longest: int = 160) -> str:
    """Returns `value` as text for an error message of one line: cut to `longest` and without control characters."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(value)[: longest + 1])
    return text if len(text) <= longest else text[: longest - 3] + "..."

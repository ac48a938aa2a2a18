"""Makes our parameters of tensors that another library named and laid out.

A family gives a table from our modules to its own (`Table`). This module finds the tensors, checks their shapes, turns
them into our layout, and keeps account: a tensor that is missing, has another shape, or that nothing takes, is an error
that names it.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.weights.lazy import Lazy, stacked, stored, zeros
from vit_dist.weights.stored_tensor import StoredTensor, printed

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows `start` to before `stop`, in shares of all rows, of a tensor that holds several of ours."""

    name: str
    start: int
    stop: int
    of: int


# What one of our modules or parameters is made of. A name stands for a tensor; `{}` in it becomes the kind of the
# parameter, such as `weight`, and `#` the number of the block. Several are stacked, along the axis that we stack
# queries, keys and values on. None: zeros.
Entry = str | Part | None | tuple[str | Part | None, ...]
# Entries by our path without the number of a block: of a parameter (`patch/bias`), or of the module that has it
# (`attention/qkv`).
Table = Mapping[str, Entry]

KINDS = {  # how our kinds of parameters are called
    "torch": {"kernel": "weight", "scale": "weight", "bias": "bias"},
    "flax": {"kernel": "kernel", "scale": "scale", "bias": "bias"},
}
TOKENS = ("cls", "registers", "position")
_BLOCK = re.compile(r"blocks/(\d+)/")


@dataclasses.dataclass(frozen=True)
class Naming:
    """How a family names and lays out its tensors.

    Attributes:
      table: see `Table`.
      manner: "torch" stores dense kernels [outputs, inputs] and patch kernels [D, C, h, w]; "flax" as we do.
      left_out: what matches one of these is not needed: text towers, tokens that mask patches in training.
      as_stored: paths of kernels that lie as ours do in spite of the manner.
      stacked: blocks are stored as one tensor for all, along the first axis.
      batched_tokens: tokens and positions have a leading axis of size 1.
      sizes_from: tensors whose shapes tell sizes of the model, for errors; of the others a config tells.
    """

    table: Table
    manner: Literal["torch", "flax"] = "torch"
    left_out: tuple[str, ...] = ()
    as_stored: tuple[str, ...] = ()
    stacked: bool = False
    batched_tokens: bool = True
    sizes_from: tuple[str, ...] = ()

    @property
    def told_by(self) -> str:
        """What tells the model's sizes, as a part of an error: nothing, where it is a config."""
        return f", as {' and '.join(self.sizes_from)} would have it" if self.sizes_from else ""


class Tensors:
    """The tensors of `file`; `taken` has for each that was used the paths of our parameters that are made of it."""

    def __init__(self, tensors: Mapping[str, StoredTensor], file: Path):
        self._tensors, self._file = tensors, file
        self.taken: dict[str, list[str]] = {}

    def take(self, name: str, path: str, allowed: Sequence[Shape], told_by: str = "") -> Lazy:
        """Returns a tensor, of which our parameter `path` is made; `told_by` says why its shape must be one of these.

        Raises `ConfigError` if it is missing or has another shape.
        """
        if name not in self._tensors:
            raise ConfigError(f"{self._file}: tensor {name} is missing, of which {path} is made; fetch the file again")
        found = self._tensors[name].shape
        if found not in allowed:
            expected = " or ".join(printed(list(shape)) for shape in allowed)
            raise ConfigError(
                f"{self._file}: tensor {name} has the shape {printed(list(found))}, expected {expected}{told_by}; "
                f"{path} is made of it; fetch the file and what lies beside it again"
            )
        paths = self.taken.setdefault(name, [])
        if path not in paths:
            paths.append(path)
        return stored(self._tensors[name])

    def check_all_taken(self, left_out: Iterable[str]) -> list[str]:
        """Returns the tensors that are left out on purpose; raises `ConfigError` if others were not taken."""
        rest = sorted(self._tensors.keys() - self.taken.keys())
        patterns = [re.compile(pattern) for pattern in left_out]
        unknown = [name for name in rest if not any(pattern.match(name) for pattern in patterns)]
        if unknown:
            shown = ", ".join(f"{printed(name)} {printed(list(self._tensors[name].shape))}" for name in unknown[:4])
            more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
            raise ConfigError(
                f"{self._file}: the model has no place for tensor {shown}{more}; remove what is not its own"
            )
        return rest


def parameters(naming: Naming, tensors: Tensors, shapes: Mapping[str, Shape], pixels: Shape) -> dict[str, Lazy]:
    """Returns our parameters by path, except the tokens (`TOKENS`); see `tokens`.

    Args:
      naming: the family's.
      tensors: those of the file.
      shapes: of our parameters by path, the blocks' one by one: `blocks/0/norm1/scale`.
      pixels: (height, width, channels) of a patch.

    Raises:
      ConfigError: names a tensor that is missing or has another shape.
    """
    depth = len({block[1] for path in shapes if (block := _BLOCK.match(path))})
    return {
        path: _parameter(naming, tensors, path, shape, pixels, depth)
        for path, shape in shapes.items()
        if path not in TOKENS
    }


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A tensor, or some of its rows, that a parameter of ours is made of, or a part of it.

    Attributes:
      name: of the tensor.
      stored: the shape of the whole tensor, of one block where those of all are stacked.
      rows: those that count, from and to before.
      shape: of the parameter, or of the part.
    """

    name: str
    stored: Shape
    rows: tuple[int, int]
    shape: Shape


@dataclasses.dataclass(frozen=True)
class _Source:
    """What a parameter of ours is made of: its pieces, None for zeros, along `axis` if it is a stack of several.

    Attributes:
      own: its path without the number of the block.
      block: that number; None: it is in none.
      as_ours: whether its tensors lie as ours do.
      axis: of the stack; None: there is one piece.
      pieces: see above.
    """

    own: str
    block: int | None
    as_ours: bool
    axis: int | None
    pieces: tuple[_Piece | None, ...]


def _source(naming: Naming, path: str, shape: Shape, pixels: Shape) -> _Source:
    block = _BLOCK.match(path)
    number, own = (int(block[1]), path[block.end() :]) if block else (None, path)
    module, _, kind = own.rpartition("/")
    entry = naming.table[own] if own in naming.table else naming.table[module]
    as_ours = naming.manner == "flax" or own in naming.as_stored

    def piece(entry: str | Part | None, shape: Shape) -> _Piece | None:
        if entry is None:
            return None
        part = entry if isinstance(entry, Part) else Part(entry, 0, 1, 1)
        name = part.name.replace("{}", KINDS[naming.manner].get(kind, kind)).replace("#", str(number))
        rows, *rest = stored = _stored_shape(own, shape, pixels, as_ours)
        if part.of == 1:
            return _Piece(name, stored, (0, rows), shape)
        share = rows // (part.stop - part.start)
        return _Piece(name, (share * part.of, *rest), (part.start * share, part.stop * share), shape)

    if not isinstance(entry, tuple):
        return _Source(own, number, as_ours, None, (piece(entry, shape),))
    axis = 1 if kind == "kernel" else 0
    part_shape = (*shape[:axis], *shape[axis + 1 :])
    return _Source(own, number, as_ours, axis, tuple(piece(each, part_shape) for each in entry))


def _parameter(naming: Naming, tensors: Tensors, path: str, shape: Shape, pixels: Shape, depth: int) -> Lazy:
    source = _source(naming, path, shape, pixels)
    in_stack = naming.stacked and source.block is not None

    def one(piece: _Piece | None, shape: Shape) -> Lazy:
        if piece is None:
            return zeros(*shape)
        allowed = (depth, *piece.stored) if in_stack else piece.stored
        tensor = tensors.take(piece.name, path, [allowed], naming.told_by)
        if in_stack:
            assert source.block is not None
            tensor = tensor.at(source.block)
        if piece.rows != (0, piece.stored[0]):
            tensor = tensor.part(0, *piece.rows)
        return _as_ours(tensor, source.own, shape, source.as_ours)

    axis = source.axis
    if axis is None:
        return one(source.pieces[0], shape)
    part_shape = (*shape[:axis], *shape[axis + 1 :])
    return stacked([one(each, part_shape) for each in source.pieces], axis)


def stored_tensors(naming: Naming, ours: Mapping[str, np.ndarray], pixels: Shape) -> dict[str, np.ndarray]:
    """Returns the tensors by name of which `parameters` would make `ours`, except those of the tokens.

    Args:
      naming: the family's.
      ours: our parameters by path, the blocks one by one.
      pixels: (height, width, channels) of a patch.

    Raises:
      ConfigError: the family has no tensor for a parameter that is not zero, or one for two that differ.
    """
    depth = len({block[1] for path in ours if (block := _BLOCK.match(path))})
    found: dict[str, np.ndarray] = {}
    filled: dict[tuple, str] = {}  # name, block of a stack and rows -> path

    def put(piece: _Piece, source: _Source, value: np.ndarray, path: str) -> None:
        in_stack = naming.stacked and source.block is not None
        shape = (depth, *piece.stored) if in_stack else piece.stored
        whole = found.setdefault(piece.name, np.zeros(shape, np.float32))
        rows = (whole[source.block] if in_stack else whole)[slice(*piece.rows)]
        key = (piece.name, source.block if in_stack else None, piece.rows)
        if key in filled and not np.array_equal(rows, value):
            raise ConfigError(f"{path}: differs from {filled[key]}, and both would be tensor {piece.name}")
        filled[key] = path
        rows[...] = value

    for path, array in ours.items():
        if path in TOKENS:
            continue
        source = _source(naming, path, array.shape, pixels)
        axis = source.axis
        parts = [array] if axis is None else [array.take(i, axis) for i in range(array.shape[axis])]
        for piece, part in zip(source.pieces, parts, strict=True):
            if piece is not None:
                put(piece, source, _as_stored(part, source.own, piece, pixels, source.as_ours), path)
            elif part.any():
                which = "" if axis is None else " in part"
                raise ConfigError(f"{path}: is not zero{which}, as the format has no tensor for it")
    return found


def _stored_shape(own: str, shape: Shape, pixels: Shape, as_ours: bool) -> Shape:
    """Returns the shape of the tensor that a parameter of ours is made of."""
    if own == "patch/kernel":
        height, width, channels = pixels
        return (height, width, channels, shape[1]) if as_ours else (shape[1], channels, height, width)
    if own == "pool/probe":
        return (1, *shape)
    if as_ours:
        return shape
    if not own.endswith("kernel"):
        return (math.prod(shape),)
    inputs = _inputs(own)
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))


def _inputs(own: str) -> int:
    """Returns how many axes of a kernel of ours, such as heads, count its inputs."""
    return 2 if own in ("attention/projection/kernel", "pool/projection/kernel") else 1


def _as_ours(tensor: Lazy, own: str, shape: Shape, as_ours: bool) -> Lazy:
    """Returns a tensor of `_stored_shape` as the parameter of ours."""
    if own == "patch/kernel":
        return (tensor if as_ours else tensor.transposed(2, 3, 1, 0)).shaped(*shape)
    if own == "pool/probe":
        return tensor.at(0)
    if own.endswith("kernel") and not as_ours:
        tensor = tensor.transposed(1, 0)
    if len(tensor.shape) < len(shape):  # one axis holds the channels of all heads
        axes = range(len(tensor.shape))
        axis = next((axis for axis in axes if tensor.shape[axis] != shape[axis]), axes[-1])
        tensor = tensor.split(axis, *shape[axis : axis + 2])
    return tensor


def _as_stored(array: np.ndarray, own: str, piece: _Piece, pixels: Shape, as_ours: bool) -> np.ndarray:
    """Returns a parameter of ours, or a part of one, as the rows of its tensor: what `_as_ours` undoes."""
    if own == "patch/kernel":
        array = array.reshape(*pixels, -1)
        array = array if as_ours else array.transpose(3, 2, 0, 1)
    elif own.endswith("kernel") and not as_ours:
        array = array.reshape(math.prod(array.shape[: _inputs(own)]), -1).T
    first, last = piece.rows
    return array.reshape(last - first, *piece.stored[1:])

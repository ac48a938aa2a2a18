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
from vit_dist.weights.lazy import Lazy, computed, stacked, stored, zeros
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


def _parameter(naming: Naming, tensors: Tensors, path: str, shape: Shape, pixels: Shape, depth: int) -> Lazy:
    block = _BLOCK.match(path)
    number, own = (int(block[1]), path[block.end() :]) if block else (0, path)
    module, _, kind = own.rpartition("/")
    entry = naming.table[own] if own in naming.table else naming.table[module]

    def one(entry: str | Part | None, shape: Shape) -> Lazy:
        if entry is None:
            return zeros(*shape)
        part = entry if isinstance(entry, Part) else Part(entry, 0, 1, 1)
        name = part.name.replace("{}", KINDS[naming.manner].get(kind, kind)).replace("#", str(number))
        as_ours = naming.manner == "flax" or own in naming.as_stored
        expected = rows, *rest = _stored_shape(own, shape, pixels, as_ours)
        share = rows // (part.stop - part.start)
        if part.of > 1:
            expected = (share * part.of, *rest)
        in_blocks = block and naming.stacked
        tensor = tensors.take(name, path, [(depth, *expected) if in_blocks else tuple(expected)], naming.told_by)
        if in_blocks:
            tensor = tensor.at(number)
        if part.of > 1:
            tensor = tensor.part(0, part.start * share, part.stop * share)
        return _as_ours(tensor, own, shape, as_ours)

    if not isinstance(entry, tuple):
        return one(entry, shape)
    axis = 1 if kind == "kernel" else 0
    return stacked([one(each, (*shape[:axis], *shape[axis + 1 :])) for each in entry], axis)


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
    inputs = 2 if own in ("attention/projection/kernel", "pool/projection/kernel") else 1  # axes, such as heads
    return (math.prod(shape[inputs:]), math.prod(shape[:inputs]))


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


def tokens(
    naming: Naming,
    tensors: Tensors,
    names: tuple[str | None, str | None, Sequence[str]],
    shapes: Mapping[str, Shape],
    patches: int,
) -> dict[str, Lazy]:
    """Returns our tokens and learned positions by path.

    The positions of a file begin with that of the class token if ours do, and with those of the registers or without. A
    position for which we have no row is added to its token.

    Args:
      naming: the family's.
      tensors: those of the file.
      names: of the positions, of the class token, and of the other special tokens; None or nothing: there are none.
      shapes: those of our parameters by path.
      patches: the number of patches.

    Raises:
      ConfigError: names a tensor that is missing or has another shape.
    """
    (width,), registers = shapes["patch/bias"], shapes.get("registers", (0,))[0]

    def take(name: str, path: str, *counts: int) -> Lazy:
        """Returns tokens [N, D], of which there may be so many."""
        lead = (1,) if naming.batched_tokens else ()
        allowed = [(*lead, count, width) for count in counts]
        if path == "cls" and not lead:
            allowed = [(width,)]
        token = tensors.take(name, path, allowed, naming.told_by)
        return token.shaped(math.prod(token.shape) // width, width)

    position, cls, others = names
    special = [take(cls, "cls", 1)] if cls else []
    special += [take(name, "registers", registers // len(others)) for name in others]
    counts = [token.shape[0] for token in special]
    found: dict[str, Lazy] = {}
    if position:
        own = shapes["position"][0] - patches  # 1: the class token has a position
        possible = {own, own if cls and not own else sum(counts)}
        rows = take(position, "position", *(patches + before for before in sorted(possible)))
        before = rows.shape[0] - patches
        # What ours keeps: the class token's row, if it has one, and those of the patches.
        added, place = [], 0
        for token, count in zip(special, counts, strict=True):
            keeps = place == 0 and own == 1
            extra = rows.part(0, place, place + count) if place + count <= before and not keeps else None
            added.append(token if extra is None else computed(token.shape, lambda a, b: a + b, token, extra))
            place += count
        special = added
        found["position"] = rows.part(0, before, rows.shape[0])
        if own:
            found["position"] = joined([rows.part(0, 0, 1), found["position"]])
    if cls:
        found["cls"] = special.pop(0).shaped(width)
    if registers:
        found["registers"] = joined(special)
    return found


def joined(parts: list[Lazy]) -> Lazy:
    """Returns small arrays joined along their first axis."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return computed(shape, lambda *arrays: np.concatenate(arrays), *parts)

"""Makes our parameters of tensors that another library named and laid out.

A family gives a table from our modules to its own (`Table`). This module finds the tensors, checks their shapes, turns
them into our layout, and keeps account: a tensor that is missing, has another shape, or that nothing takes, is an error
that names it.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
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
    """

    table: Table
    manner: Literal["torch", "flax"] = "torch"
    left_out: tuple[str, ...] = ()
    as_stored: tuple[str, ...] = ()
    stacked: bool = False


class Tensors:
    """The tensors of a file; `taken` has for each that was used the paths of our parameters that are made of it."""

    def __init__(self, tensors: Mapping[str, StoredTensor]):
        self._tensors = tensors
        self.taken: dict[str, list[str]] = {}

    def has(self, name: str) -> bool:
        return name in self._tensors

    def take(self, name: str, path: str) -> Lazy:
        """Returns a tensor, of which our parameter `path` is made; raises `ConfigError` if it is missing."""
        if name not in self._tensors:
            raise ConfigError(f"init.weights: tensor {name} is missing, of which {path} is made; fetch the file again")
        self.taken.setdefault(name, []).append(path)
        return stored(self._tensors[name])

    def check_all_taken(self, left_out: Iterable[str]) -> list[str]:
        """Returns the tensors that are left out on purpose; raises `ConfigError` if others were not taken."""
        rest = sorted(self._tensors.keys() - self.taken.keys())
        patterns = [re.compile(pattern) for pattern in left_out]
        unknown = [name for name in rest if not any(pattern.match(name) for pattern in patterns)]
        if unknown:
            shown = ", ".join(f"{printed(name)} {list(self._tensors[name].shape)}" for name in unknown[:4])
            more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
            raise ConfigError(
                f"init.weights: the model has no place for tensor {shown}{more}; remove what is not its own"
            )
        return rest


def parameters(naming: Naming, tensors: Tensors, shapes: Mapping[str, Shape]) -> dict[str, Lazy]:
    """Returns our parameters by path, except the tokens (`TOKENS`), which a family makes itself.

    Args:
      naming: the family's.
      tensors: those of the file.
      shapes: of our parameters by path, the blocks' one by one: `blocks/0/norm1/scale`.

    Raises:
      ConfigError: names a tensor that is missing or has another shape.
    """
    return {path: _parameter(naming, tensors, path, shape) for path, shape in shapes.items() if path not in TOKENS}


def _parameter(naming: Naming, tensors: Tensors, path: str, shape: Shape) -> Lazy:
    block = _BLOCK.match(path)
    number, own = (int(block[1]), path[block.end() :]) if block else (0, path)
    module, _, kind = own.rpartition("/")
    entry = naming.table[own] if own in naming.table else naming.table[module]

    def one(entry: str | Part | None, shape: Shape) -> Lazy:
        if entry is None:
            return zeros(*shape)
        part = entry if isinstance(entry, Part) else Part(entry, 0, 1, 1)
        name = part.name.replace("{}", KINDS[naming.manner].get(kind, kind)).replace("#", str(number))
        tensor = tensors.take(name, path)
        if block and naming.stacked:
            tensor = tensor.at(number)
        if part.of > 1:
            rows = tensor.shape[0] // part.of
            tensor = tensor.part(0, part.start * rows, part.stop * rows)
        ours = naming.manner == "flax" or own in naming.as_stored
        turned = tensor if ours else _as_ours(tensor, own, kind)
        fitted = _split(turned, shape)
        if fitted is None:
            wanted = f"{shape}, as {path}"
            raise ConfigError(
                f"init.weights: tensor {name} has the shape {list(tensor.shape)}, expected that of {wanted}"
            )
        return fitted

    if not isinstance(entry, tuple):
        return one(entry, shape)
    axis = 1 if kind == "kernel" else 0
    return stacked([one(each, (*shape[:axis], *shape[axis + 1 :])) for each in entry], axis)


def _as_ours(tensor: Lazy, own: str, kind: str) -> Lazy:
    """Returns a tensor of PyTorch with the axes of ours in our order."""
    if kind != "kernel" or len(tensor.shape) < 2:
        return tensor
    if own == "patch/kernel" and len(tensor.shape) == 4:
        return tensor.transposed(2, 3, 1, 0)
    return tensor.transposed(1, 0)


def _split(tensor: Lazy, shape: Shape) -> Lazy | None:
    """Returns the tensor in a shape of ours: axes are split into heads, or pixels joined; None if it cannot be."""
    if math.prod(tensor.shape) != math.prod(shape):
        return None
    if len(tensor.shape) > len(shape):
        return tensor.shaped(*shape) if tensor.shape[-1] == shape[-1] else None
    for axis, size in enumerate(shape):
        if axis == len(tensor.shape) or tensor.shape[axis] % size:
            return None
        if tensor.shape[axis] != size:
            tensor = tensor.split(axis, size, tensor.shape[axis] // size)
    return tensor


def tokens(
    position: Lazy | None, cls: Lazy | None, registers: list[Lazy], shapes: Mapping[str, Shape], patches: int
) -> dict[str, Lazy]:
    """Returns our tokens and learned positions by path.

    The positions of a file may be those of the patches alone, or begin with those of the class token, or of all special
    tokens. A position for which we have no row is added to its token.

    Args:
      position: [1, N, D] or [N, D]; None: the model has none to learn.
      cls: the class token, of D elements; None: there is none.
      registers: the other special tokens, in their order, each of R D elements.
      shapes: those of our parameters by path.
      patches: the number of patches.

    Raises:
      ConfigError: the number of positions fits none of these.
    """
    width = shapes["patch/bias"][0]
    special = [] if cls is None else [cls.shaped(1, width)]
    special += [token.shaped(math.prod(token.shape) // width, width) for token in registers]
    counts = [token.shape[0] for token in special]
    found: dict[str, Lazy] = {}
    if position is not None:
        rows = math.prod(position.shape) // width
        position = position.shaped(rows, width)
        before = rows - patches
        allowed = {0, 1 if cls is not None else 0, sum(counts)}
        if before not in allowed:
            raise ConfigError(
                f"init.weights: {rows} positions, but the model has {patches} patches and {sum(counts)} other tokens; "
                "set model.image_size to that of the weights"
            )
        own = shapes["position"][0] - patches if "position" in shapes else 0
        # What ours keeps: the class token's row, if it has one, and those of the patches.
        added, place = [], 0
        for token, count in zip(special, counts, strict=True):
            keeps = place == 0 and own == 1
            extra = position.part(0, place, place + count) if place + count <= before and not keeps else None
            added.append(token if extra is None else computed(token.shape, lambda a, b: a + b, token, extra))
            place += count
        special = added
        found["position"] = position.part(0, before, rows)
        if own:
            first = position.part(0, 0, 1) if before else zeros(1, width)
            found["position"] = joined([first, found["position"]])
    if cls is not None:
        found["cls"] = special.pop(0).shaped(width)
    if special:
        found["registers"] = joined(special)
    return found


def joined(parts: list[Lazy]) -> Lazy:
    """Returns small arrays joined along their first axis."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return computed(shape, lambda *arrays: np.concatenate(arrays), *parts)

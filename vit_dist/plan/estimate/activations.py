"""What a block of the model keeps of its forward pass until its backward pass, array by array.

The loop over blocks stacks these arrays, and no compiler can take one of them away: their list follows from how the
block is written and from `model.remat` alone. What tests hold it to is the traced program. Unrolled blocks
(`scan=False`) are the compiler's to see through, and it keeps less.
"""

import dataclasses
import math

from vit_dist import config
from vit_dist.model.vit import shape_of


@dataclasses.dataclass(frozen=True)
class LocalShape:
    """What one device has of an example's activations in a block."""

    tokens: int  # those it holds; padded, where the mesh splits them
    width: int
    heads: int
    head_size: int
    hidden: int  # units of the MLP
    tiled: bool = False  # a TPU keeps arrays in tiles of 8 x 128 elements

    def elements(self, kind: str) -> int:
        """How many elements of memory an array of this kind takes for one example."""
        tokens = self.tokens
        return {
            "width": self._matrix(tokens, self.width),  # [N, D]
            "rows": self._matrix(1, tokens),  # [N]
            "heads": self.heads * self._matrix(tokens, self.head_size),  # [N, H, d]
            "head_rows": self._matrix(self.heads, tokens),  # [N, H]
            "weights": self.heads * self._matrix(tokens, tokens),  # [H, N, N]
            "hidden": self._matrix(tokens, self.hidden),  # [N, hidden]
        }[kind]

    def _matrix(self, rows: int, columns: int) -> int:
        """The elements of [rows, columns], lying the way that wastes less."""
        if not self.tiled:
            return rows * columns
        return min(_up(rows, 8) * _up(columns, 128), _up(rows, 128) * _up(columns, 8))


@dataclasses.dataclass(frozen=True)
class Kept:
    """Arrays of one kind (see `LocalShape.elements`) that a block keeps."""

    kind: str
    itemsize: int
    count: int


def kept(model: config.Model, attention: str) -> list[Kept]:
    """What one block keeps under `model.remat`. attention: what computes it, "xla", "cudnn" or "chunked"."""
    size = 2 if model.dtype == "bfloat16" else 4
    if model.remat == "block":
        return [Kept("width", size, 1)]  # its input
    if model.remat == "names":
        return _named(model, attention, size)
    arrays = _everything(model, attention, size)
    return arrays if model.scan else _seen_through(arrays)


def kept_bytes(arrays: list[Kept], part: LocalShape) -> int:
    """Bytes of these arrays for one example on a device."""
    return sum(one.count * one.itemsize * part.elements(one.kind) for one in arrays)


def _named(model: config.Model, attention: str, size: int) -> list[Kept]:
    shape = shape_of(model)
    sums = (not shape.parallel) + 2 * (model.layer_scale is not None)
    return [
        Kept("width", size, 1 + sums),  # the input, and what is named "residual" and "scaled"
        Kept("heads", size, 4),  # queries, keys, values, output
        Kept("hidden", size, 2 if shape.activation == "swiglu" else 1),
        Kept("head_rows", 4, attention == "chunked"),  # the log of the sum of weights
    ]


def _everything(model: config.Model, attention: str, size: int) -> list[Kept]:
    shape = shape_of(model)
    norms, scaled = 1 if shape.parallel else 2, 2 * (model.layer_scale is not None)
    dropped = model.dropout if model.projection_dropout is None else model.projection_dropout
    arrays = [
        Kept("width", 4, 4 * norms),  # a LayerNorm's steps, in float32
        Kept("rows", 4, 2 * norms),
        Kept("width", size, norms + 2 * scaled),
        Kept("width", 1, (dropped > 0) + (model.dropout > 0)),  # which elements stay
        Kept("hidden", size, 4 if shape.activation == "gelu" else 6),  # the activation's steps
        Kept("hidden", 1, int(model.dropout > 0)),
    ]
    if shape.qk_norm:
        arrays += [Kept("heads", 4, 8), Kept("head_rows", 4, 4)]
    return arrays + _of_attention(shape.tokens, attention, size, dropped=model.attention_dropout > 0)


def _seen_through(arrays: list[Kept]) -> list[Kept]:
    """Of the arrays of unrolled blocks, those that the compiler leaves: it makes the others from them where needed.

    Found by looking at two compilers' memory: what is float32 for the sake of accuracy comes from what is not, and a
    step of the activation from the one before. Of L/16, H200's keeps 10 % more than this and v5e's a third less.
    """
    size = next(one.itemsize for one in arrays if one.kind == "heads")
    left = [one for one in arrays if one.itemsize == size or one.itemsize == 1]
    return [
        dataclasses.replace(one, count=one.count - 1) if one.kind == "hidden" and one.itemsize == size else one
        for one in left
    ] + [Kept("width", size, 2)]


def _of_attention(tokens: int, attention: str, size: int, *, dropped: bool) -> list[Kept]:
    heads = Kept("heads", size, 4)  # queries, keys, values, output
    if attention == "chunked":
        return [heads, Kept("head_rows", 4, 1)]
    if attention == "cudnn":  # of odd numbers of tokens the output is there with padding and without
        return [heads, Kept("heads", size, tokens % 2), Kept("head_rows", 4, 1)]
    return [
        heads,
        Kept("weights", 4, 1),  # float32, as the softmax gives them
        Kept("weights", size, 1),  # as they meet the values
        Kept("weights", 1, int(dropped)),
        Kept("head_rows", 4, 2),
    ]


def _up(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit

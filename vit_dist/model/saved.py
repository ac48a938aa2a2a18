"""Lists the arrays that a block of the model saves in its forward pass for its backward pass.

The list follows from the code of the block and from `model.remat` alone, and tests compare it with the traced program.
Unrolled blocks give the compiler the same arrays to keep as the loop over blocks, which stacks them.
"""

import dataclasses
import math

from vit_dist import config
from vit_dist.model.shape import shape_of


@dataclasses.dataclass(frozen=True)
class LocalShape:
    """The sizes of one example's activations in a block on one device."""

    tokens: int  # of this device, with padding if the mesh splits them
    width: int
    heads: int
    head_size: int
    hidden: int  # units of the MLP
    tiled: bool = False  # whether arrays are stored in tiles of 8 x 128 elements, as on a TPU

    def elements(self, kind: str) -> int:
        """Returns the elements that an array of this kind occupies in memory for one example, with padding."""
        tokens = self.tokens
        return {
            "width": self._matrix(tokens, self.width),  # [N, D]
            "heads": self.heads * self._matrix(tokens, self.head_size),  # [N, H, d]
            "flat heads": self._matrix(tokens, self.heads * self.head_size),  # [N, H d]: no padding of each head
            "head_rows": self._matrix(self.heads, tokens),  # [N, H]
            "weights": self.heads * self._matrix(tokens, tokens),  # [H, N, N]
            "hidden": self._matrix(tokens, self.hidden),  # [N, hidden]
        }[kind]

    def _matrix(self, rows: int, columns: int) -> int:
        """Returns the elements of [rows, columns], in the order of dimensions that needs less padding."""
        if not self.tiled:
            return rows * columns
        return min(_round_up(rows, 8) * _round_up(columns, 128), _round_up(rows, 128) * _round_up(columns, 8))


@dataclasses.dataclass(frozen=True)
class Saved:
    """Arrays of one kind (see `LocalShape.elements`) that a block saves."""

    kind: str
    itemsize: int
    count: int


def saved_arrays(model: config.Model, attention: str, *, exchanged: bool = False) -> list[Saved]:
    """Returns what one block saves under `model.remat`.

    Args:
      model: the config.
      attention: what computes attention, as `kernels.implementation` names it.
      exchanged: whether tokens are exchanged for heads around it (all-to-all attention): the block then saves its
        output again, split by tokens.
    """
    size = 2 if model.dtype == "bfloat16" else 4
    if model.remat == "block":
        return [Saved("width", size, 1)]  # its input
    if model.remat == "names":
        arrays = _saved_by_name(model, attention, size)
    else:
        arrays = _saved_without_remat(model, attention, size)
    return [*arrays, Saved("flat heads", size, int(exchanged))]


def saved_bytes(arrays: list[Saved], local: LocalShape) -> int:
    """Returns the bytes of these arrays for one example on a device."""
    return sum(array.count * array.itemsize * local.elements(array.kind) for array in arrays)


def _saved_by_name(model: config.Model, attention: str, size: int) -> list[Saved]:
    shape = shape_of(model)
    kernel_keeps = attention in ("chunked", "cudnn")  # its output, and the logarithm of the softmax's denominator
    return [
        Saved("width", size, 1 if shape.parallel else 2),  # the input, and the array named "residual"
        Saved("flat heads", size, 3 if kernel_keeps else 4),  # queries, keys, values, and the output if it is named
        Saved("heads", size, int(kernel_keeps)),
        Saved("hidden", size, 2 if shape.activation == "swiglu" else 1),
        Saved("head_rows", 4, int(kernel_keeps)),
    ]


def _saved_without_remat(model: config.Model, attention: str, size: int) -> list[Saved]:
    shape = shape_of(model)
    norms = 1 if shape.parallel else 2
    projection_dropout = model.dropout if model.projection_dropout is None else model.projection_dropout
    arrays = [
        Saved("width", size, 2 * norms),  # each norm's input and output
        Saved("width", 1, (projection_dropout > 0) + (model.dropout > 0)),  # dropout masks
        Saved("hidden", size, 2 if shape.activation == "swiglu" else 1),  # the activation's inputs
        Saved("hidden", 1, int(model.dropout > 0)),
    ]
    if shape.qk_norm:
        arrays.append(Saved("heads", size, 2))  # the inputs of the two norms
    return arrays + _saved_by_attention(shape.tokens, attention, size, dropout=model.attention_dropout > 0)


def _saved_by_attention(tokens: int, attention: str, size: int, *, dropout: bool) -> list[Saved]:
    heads = Saved("heads", size, 4)  # queries, keys, values, output
    if attention == "pallas":
        return [dataclasses.replace(heads, kind="flat heads")]
    if attention == "chunked":
        return [heads, Saved("head_rows", 4, 1)]
    if attention == "cudnn":  # for odd numbers of tokens it saves the output with padding and without
        return [heads, Saved("heads", size, tokens % 2), Saved("head_rows", 4, 1)]
    return [
        dataclasses.replace(heads, count=3),
        Saved("flat heads", size, 1),  # the output, which a TPU keeps flat; elsewhere the same bytes
        Saved("weights", 4, 1),  # the float32 result of the softmax
        Saved("weights", size, 1),  # cast, for the product with the values
        Saved("weights", 1, int(dropout)),
        Saved("head_rows", 4, 2),
    ]


def _round_up(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit

"""Floating-point operations of a Vision Transformer, by arithmetic: the counts of different compilers are incomparable.

A multiplication and an addition count as two operations, and only matrix products count. A training step costs three
times the forward pass: one forward pass, and twice as much backward.
"""

import itertools

from vit_dist import config
from vit_dist.model.shape import shape_of


def forward_flops(model: config.Model) -> int:
    """Returns the operations of the forward pass of one image."""
    shape = shape_of(model)
    patches, tokens = shape.patches, shape.tokens
    width, hidden = shape.width, shape.mlp * (3 if shape.activation == "swiglu" else 2)
    embed = patches * shape.patch[0] * shape.patch[1] * shape.channels * width
    block = tokens * width * (4 * width + hidden) + 2 * tokens * tokens * width
    pool = 0
    if model.pool == "map":  # one query over the patches, then an MLP on one token
        pool = 2 * patches * width * width + 2 * width * width + 2 * patches * width + width * hidden
    sizes = [shape.pooled, *filter(None, (model.output_projection, model.pre_logits)), shape.classes]
    head = sum(inputs * outputs for inputs, outputs in itertools.pairwise(sizes))
    return 2 * (embed + shape.depth * block + pool + head)


def training_flops(model: config.Model) -> int:
    """Returns the operations per image of a training step."""
    return 3 * forward_flops(model)


def recomputed_flops(model: config.Model, attention: str = "xla") -> int:
    """Returns the operations per image that the backward pass repeats under `model.remat`.

    The backward pass of a block needs the inputs of every product. "names" keeps all of them except the attention
    weights, for which queries are multiplied by keys again; "block" keeps none and computes again what later inputs
    depend on.

    Args:
      model: the model's config.
      attention: what computes attention: "xla", a kernel of `model.kernels`, or "chunked" (`model.context`). All but
        XLA compute the weights again within their own backward pass under any `remat`, which is not counted.

    Returns:
      The number of operations.
    """
    shape = shape_of(model)
    if model.remat == "none":
        return 0
    product = 2 * shape.tokens * shape.tokens * shape.width  # queries by keys; weights by values cost as much
    if model.remat == "names":
        return shape.depth * product if attention == "xla" else 0
    dense = 2 * shape.tokens * shape.width * shape.width
    up = 2 * shape.tokens * shape.width * shape.mlp
    block = 3 * dense + 2 * product + up * (2 if shape.activation == "swiglu" else 1)
    if not shape.parallel:
        block += dense  # the projection, for the second norm's input
    return shape.depth * block


def hardware_flops(model: config.Model, attention: str = "xla") -> int:
    """Returns the operations per image of a training step, repeated ones included; see `recomputed_flops`."""
    return training_flops(model) + recomputed_flops(model, attention)

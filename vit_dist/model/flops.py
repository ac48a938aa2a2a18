"""Floating-point operations of a Vision Transformer, by arithmetic: compilers' own counts cannot be compared.

A multiplication and an addition count apart, and only matrix products count. A training step takes three times the
forward pass: once forward, twice backward.
"""

from vit_dist import config
from vit_dist.model.vit import shape_of


def forward_flops(model: config.Model) -> int:
    """Of the forward pass of one image."""
    shape = shape_of(model)
    patches, tokens = shape.patches, shape.tokens
    width, hidden = shape.width, shape.mlp * (3 if shape.activation == "swiglu" else 2)
    embed = patches * shape.patch[0] * shape.patch[1] * shape.channels * width
    block = tokens * width * (4 * width + hidden) + 2 * tokens * tokens * width
    pool = 0
    if model.pool == "map":  # one query over the patches, then an MLP on one token
        pool = 2 * patches * width * width + 2 * width * width + 2 * patches * width + width * hidden
    last = model.pre_logits or width
    head = last * shape.classes + (width * last if model.pre_logits else 0)
    return 2 * (embed + shape.depth * block + pool + head)


def training_flops(model: config.Model) -> int:
    """Of one image in a training step."""
    return 3 * forward_flops(model)


def recomputed_flops(model: config.Model, attention: str = "xla") -> int:
    """Of one image: what the backward pass of a training step computes a second time under `model.remat`.

    A block's backward pass needs every product's inputs. "names" keeps them all but the attention weights, for which
    queries and keys meet again; "block" keeps none, and makes again what some later input rests on.

    attention: what computes it: "xla", "cudnn", or "chunked" (`model.context`). The last two make the weights again
    within their own backward pass, under any `remat`, which is not counted. But what cuDNN keeps for it beside the
    output has no name, so that "names" runs its forward kernel twice.
    """
    shape = shape_of(model)
    if model.remat == "none":
        return 0
    product = 2 * shape.tokens * shape.tokens * shape.width  # queries by keys; weights by values cost as much
    if model.remat == "names":
        return shape.depth * product * {"xla": 1, "cudnn": 2, "chunked": 0}[attention]
    dense = 2 * shape.tokens * shape.width * shape.width
    up = 2 * shape.tokens * shape.width * shape.mlp
    block = 3 * dense + 2 * product + up * (2 if shape.activation == "swiglu" else 1)
    if not shape.parallel or model.layer_scale is not None:
        block += dense  # the projection: the second norm's input rests on it, and its scale's gradient
    if model.layer_scale is not None:
        block += up  # the second layer's result, for its scale's gradient
    return shape.depth * block


def hardware_flops(model: config.Model, attention: str = "xla") -> int:
    """Of one image in a training step, with what is computed again; attention: as in `recomputed_flops`."""
    return training_flops(model) + recomputed_flops(model, attention)

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

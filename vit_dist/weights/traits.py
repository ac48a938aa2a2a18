"""The keys that say what a model computes and how its images are prepared: what weights bring along."""

from typing import Any

from vit_dist.config import Model, pair
from vit_dist.model.shape import shape_of

# The keys of `config.Model` that say what a model computes, and how its rotations vary in training; the others are of
# its training and its arithmetic.
TRAITS = (
    "width", "depth", "mlp", "heads", "image_size", "patch_size", "channels", "num_classes", "pool", "pool_norm",
    "output_projection", "class_token", "position", "cls_position", "registers", "rope_base", "rope_jitter",
    "rope_rescale", "layer_scale", "qk_norm", "qk_norm_bias", "norm", "norm_epsilon", "embedding_norm", "qkv_bias",
    "projection_bias", "parallel", "activation", "pre_logits",
)  # fmt: skip
PREPARED = ("mean", "std", "interpolation", "eval_crop", "eval_crop_mode", "eval_rounding")


def traits_of(model: Model) -> dict[str, Any]:
    """Returns the `TRAITS` of a model, with the numbers of its variant."""
    shape = shape_of(model)
    numbers = {**vars(shape), "patch_size": shape.patch}
    return {key: numbers.get(key, getattr(model, key)) for key in TRAITS}


def full_traits_of(model: Model) -> dict[str, Any]:
    """Returns the `TRAITS` of a model as `traits_of`, with the size of its images as (height, width)."""
    return {**traits_of(model), "image_size": pair(model.image_size)}

"""The function that an exported program computes, on any device, as one of parameters by path and a batch of images.

`convert` imports this module in the environment of a converter, which has few libraries.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vit_dist import config
from vit_dist.config import pair
from vit_dist.step import augment
from vit_dist.step.state import ModelFunction

Input = Literal["float", "uint8"]  # normalised images, or pixels


def images_of(model: config.Model, input: Input, batch: Any) -> jax.ShapeDtypeStruct:
    """Returns shape and dtype of a batch of images."""
    shape = (batch, *pair(model.image_size), model.channels)
    return jax.ShapeDtypeStruct(shape, jnp.uint8 if input == "uint8" else jnp.float32)


def function_of(model: config.Model, data: config.Data, input: Input) -> Callable[[dict[str, jax.Array], Any], Any]:
    """Returns the function `(parameters by path, images [B, H, W, C]) -> logits [B, classes]`, float32.

    Args:
      model: its `num_classes` is filled in; without a head the function returns features.
      data: how pixels are normalised.
      input: what the images are.
    """
    # One loop over stacked blocks would first have to stack the parameters; kernels of one platform are no StableHLO.
    function = ModelFunction(dataclasses.replace(model, scan=False, remat="none", attention="xla"))
    tree = jax.eval_shape(lambda: function.initialise(0))
    leaves, structure = jax.tree.flatten_with_path(tree)
    paths = ["/".join(str(key.key) for key in path) for path, _ in leaves]

    def run(parameters: dict[str, jax.Array], images: Any) -> jax.Array:
        inputs = augment.normalise(images, data.mean, data.std) if input == "uint8" else images
        return function(jax.tree.unflatten(structure, [parameters[path] for path in paths]), inputs)

    return run

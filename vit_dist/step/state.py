"""The state of training: the number of steps, parameters, their moving average, and the optimizer's state.

One function makes a state, `make_state`. Under `jax.eval_shape` it returns shapes, dtypes and shardings only, for a
restore, the memory report and an ahead-of-time compilation; under `jax.jit` it returns arrays that are split from the
start. Both need the mesh to be in use (`jax.set_mesh`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from vit_dist import config
from vit_dist.model.vit import ViT

Parameters = dict[str, Any]  # nested, as in parameters["blocks"]["mlp"]["up"]["kernel"]; plain dicts trace fastest


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """Everything that a resumed run needs; its randomness and position in the data follow from `step` and the seed."""

    step: jax.Array  # int32, the number of optimizer steps done
    parameters: Parameters
    optimizer: optax.OptState
    ema: Parameters | None  # exponential moving average of the parameters


class ModelFunction:
    """The model as a pure function of its parameters; `settings` must have `num_classes` filled in."""

    def __init__(self, settings: config.Model, lora: config.Lora | None = None):
        self.settings = settings
        keywords = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        self._make = lambda seed: ViT(**keywords, lora=lora, rngs=nnx.Rngs(seed))
        self._graph, self._abstract = nnx.split(nnx.eval_shape(lambda: self._make(0)))

    def initialise(self, seed: int) -> Parameters:
        """Returns new parameters, which depend on the seed only and not on the mesh."""
        return nnx.to_pure_dict(nnx.state(self._make(seed)))

    def __call__(self, parameters: Parameters, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Returns logits [B, classes] of normalised images [B, H, W, C]; `key` as in `ViT`."""
        return self.module(parameters)(images, key)

    def module(self, parameters: Parameters) -> ViT:
        """Returns the NNX module with these parameters."""
        state = jax.tree.map(lambda leaf: leaf, self._abstract)
        nnx.replace_by_pure_dict(state, parameters)
        return nnx.merge(self._graph, state)


def make_state(model: ModelFunction, optimizer: optax.GradientTransformation, seed: int, ema: bool) -> State:
    """Returns the state before the first step; `ema`: with a moving average of the parameters."""
    parameters = model.initialise(seed)
    return State(
        step=jnp.zeros((), jnp.int32),
        parameters=parameters,
        optimizer=optimizer.init(parameters),
        ema=jax.tree.map(jnp.copy, parameters) if ema else None,
    )

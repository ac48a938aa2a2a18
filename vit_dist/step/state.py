"""What training changes: parameters, their moving average, the optimizer's state, and the count of steps.

There is one function that makes a state, and it runs in two ways: under `jax.eval_shape` it yields shapes, dtypes and
shardings only, which is what a restore, the memory report and an ahead-of-time compile need; under `jax.jit` it
yields arrays that are born split. Both need the mesh to be in use (`jax.set_mesh`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from vit_dist import config
from vit_dist.model.vit import ViT

Parameters = dict[str, Any]  # nested, such as parameters["blocks"]["mlp"]["up"]["kernel"]: plain dicts trace fastest


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """All that a resumed run needs; its randomness and its place in the data follow from `step` and the seed."""

    step: jax.Array  # int32: optimizer steps done
    parameters: Parameters
    optimizer: optax.OptState
    ema: Parameters | None  # exponential moving average of the parameters


class ModelFunction:
    """The model's program without its numbers: a pure function of parameters.

    settings: with `num_classes` filled in.
    """

    def __init__(self, settings: config.Model):
        self.settings = settings
        keywords = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        self._make = lambda seed: ViT(**keywords, rngs=nnx.Rngs(seed))
        self._graph, state = nnx.split(nnx.eval_shape(lambda: self._make(0)))
        self._empty = state

    def initialise(self, seed: int) -> Parameters:
        """Fresh parameters; the same for the same seed on every mesh."""
        return nnx.to_pure_dict(nnx.state(self._make(seed)))

    def __call__(self, parameters: Parameters, images: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Logits [B, classes] of normalised images [B, H, W, C]; `key` as in `ViT`."""
        return self.module(parameters)(images, key)

    def module(self, parameters: Parameters) -> ViT:
        """The NNX module with these parameters."""
        state = jax.tree.map(lambda leaf: leaf, self._empty)
        nnx.replace_by_pure_dict(state, parameters)
        return nnx.merge(self._graph, state)


def make_state(model: ModelFunction, optimizer: optax.GradientTransformation, seed: int, ema: bool) -> State:
    """The state before the first step."""
    parameters = model.initialise(seed)
    return State(
        step=jnp.zeros((), jnp.int32),
        parameters=parameters,
        optimizer=optimizer.init(parameters),
        ema=jax.tree.map(jnp.copy, parameters) if ema else None,
    )

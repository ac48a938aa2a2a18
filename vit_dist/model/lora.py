"""Low-rank adapters of dense layers (Hu et al. 2021, arXiv:2106.09685).

An adapted layer computes x W + (x A) B alpha / rank, where A [I, rank] is random and B [rank, O] begins at zero. A
layer of several maps of one input, queries, keys and values, has one A for all of them and a B for each. Whatever is
folded into W, a norm's scale and LayerScale, is folded into A and B as well.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.model.layers import Dense, Mlp, lecun_normal, zeros
from vit_dist.model.norm import Norm, Scale


class Adapter(nnx.Module):
    """What is added to the result of a dense layer; its methods take what those of `Dense` take."""

    def __init__(self, dense: Dense, settings: config.Lora, rngs: nnx.Rngs):
        inputs, outputs, names, count = dense.inputs, dense.outputs, dense.names, dense.count
        rank, split = (settings.rank,), len(dense.inputs)
        down_names, up_names = (*names[:split], None), (None, *names[split:])
        self.down = Dense(inputs, rank, down_names, rngs=rngs, initializer=lecun_normal, bias=None)
        self.up = Dense(rank, outputs, up_names, rngs=rngs, initializer=zeros, bias=None, count=count)
        self.factor = factor(settings)

    def __call__(self, x: jax.Array, *, norm: Norm | None = None, scale: Scale | None = None) -> jax.Array:
        return self.up(self.down(x, norm=norm) * self.factor, scale=scale)

    def of(self, function: Callable[..., jax.Array], *inputs: jax.Array, scale: Scale | None = None) -> jax.Array:
        return self.up(self.down.of(function, *inputs) * self.factor, scale=scale)

    def each(self, x: jax.Array, *, norm: Norm | None = None) -> list[jax.Array]:
        return self.up.each(self.down(x, norm=norm) * self.factor)


def factor(settings: config.Lora) -> float:
    """Returns what the product of an adapter is multiplied by."""
    return 1.0 if settings.alpha is None else settings.alpha / settings.rank


def attach(block: Any, settings: config.Lora, rngs: nnx.Rngs) -> None:
    """Gives the layers of a block (`block.Block`) that `lora.targets` names an adapter each; rank 0 gives none.

    Raises:
      ConfigError: for a rank that is none of a matrix.
    """
    if not settings.rank:
        return
    layers: dict[str, list[Dense]] = {
        "qkv": [block.attention.qkv],
        "projection": [block.attention.projection],
        "mlp": _layers_of(block.mlp),
    }
    for target in dict.fromkeys(settings.targets):
        for dense in layers[target]:
            if settings.rank > min(dense.sizes):
                raise ConfigError(
                    f"lora.rank: {settings.rank}, but a layer of {target} maps {dense.sizes[0]} to {dense.sizes[1]}; "
                    "take a smaller one"
                )
            dense.lora = nnx.data(Adapter(dense, settings, rngs))


def _layers_of(mlp: Mlp) -> list[Dense]:
    return [layer for layer in (mlp.gate, mlp.up, mlp.down) if layer is not None]

"""Pooling: from tokens [B, N, D] to one vector for each image.

Tokens are pooled from `start` to before `stop`, for registers and padding are left out. If the mesh splits tokens, a
mask takes the place of a slice.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from vit_dist import config
from vit_dist.mesh import layout
from vit_dist.model.attention import attend
from vit_dist.model.layers import INITIALIZERS, Dense, Mlp
from vit_dist.model.norm import Norm
from vit_dist.model.parameters import cast_and_gather, make_parameter
from vit_dist.model.shape import Shape


class AttentionPool(nnx.Module):
    """Attends with one learned query, then applies an MLP: [B, N, D] -> [B, D] (Zhai et al. 2022, arXiv:2106.04560)."""

    def __init__(self, model: config.Model, shape: Shape, rngs: nnx.Rngs):
        common: dict[str, Any] = {"rngs": rngs, "initializer": INITIALIZERS[model.kernel_init]}
        names, size = ("width", "heads", None), shape.width // shape.heads
        self.probe = make_parameter(rngs, initializers.normal(0.02), (1, shape.width), (None, "width"))
        self.query = Dense((shape.width,), (shape.heads, size), names, **common)
        self.key_value = Dense((shape.width,), (shape.heads, size), names, count=2, **common)
        self.projection = Dense((shape.heads, size), (shape.width,), ("heads", None, "width"), **common)
        self.norm = Norm(model, shape.width, "width", rngs=rngs)
        self.mlp = Mlp(shape.width, shape.mlp, activation=shape.activation, dropout=0.0, **common)

    def __call__(self, x: jax.Array, start: int, stop: int) -> jax.Array:
        """Pools tokens `start` to before `stop` of x [B, N, D]."""
        x, mask = selected(x, start, stop)
        split = layout.spec_of(x, 1, None, None)  # by examples only
        probe = layout.broadcast(cast_and_gather(self.probe, x.dtype, split), (x.shape[0], 1, x.shape[2]), split)
        key, value = self.key_value.each(x)
        # The weights of one query, [B, H, 1, N], are small: a fused kernel would gain nothing.
        x = self.projection(layout.joined(attend(self.query(probe), key, value, "xla", mask=mask), 2))
        return (x + self.mlp(self.norm(x), None))[:, 0]


def mean(x: jax.Array, start: int, stop: int, norm: Norm | None) -> jax.Array:
    """Returns the mean [B, D] of tokens of x [B, N, D], which `norm` normalises first; computed in float32."""
    dtype = x.dtype
    x, mask = selected(x, start, stop)
    if norm is not None:
        # The mean of normalised tokens is scaled and shifted, instead of every token. Without the barriers XLA's GPU
        # compiler stores all tokens, and then their gradients, in float32.
        barrier = jax.lax.optimization_barrier
        x = barrier(norm.normalise(barrier(x)))
    x = x.astype(jnp.float32)
    if mask is not None:
        x = jnp.where(mask[:, None], x, 0)
    pooled = jax.lax.reduce_sum(x, (1,), out_sharding=layout.spec("batch", None)) / (stop - start)
    return (pooled if norm is None else norm.affine(pooled)).astype(dtype)


def selected(x: jax.Array, start: int, stop: int) -> tuple[jax.Array, jax.Array | None]:
    """Returns tokens of x [B, N, D] and None; or, if the mesh splits tokens, x and a mask of them, bool [N]."""
    if layout.shard_count("tokens") == 1:
        return x[:, start:stop], None
    return x, token_mask(start, stop, x)


def token_mask(start: int, stop: int, x: jax.Array) -> jax.Array:
    """Returns a mask, bool [N], that is True from `start` to before `stop`, split like the tokens of x [B, N, D]."""
    number = jax.lax.broadcasted_iota(jnp.int32, (x.shape[1],), 0, out_sharding=layout.spec("tokens"))
    return (start <= number) & (number < stop)

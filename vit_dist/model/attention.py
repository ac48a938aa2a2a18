"""Multi-head self-attention, its heads split over `tensor`, with the fastest implementation for the hardware.

`attend` takes the device's fused kernel (`model.kernels`) where one fits, and plain einsums elsewhere. If the mesh
splits tokens, `attend_split` takes its place, with the algorithms of `model.context`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vit_dist import config
from vit_dist.mesh import layout
from vit_dist.model import context, kernels
from vit_dist.model.layers import INITIALIZERS, Dense, dropout, split_key
from vit_dist.model.norm import Norm, Scale
from vit_dist.model.position import Rotation, rotate
from vit_dist.model.shape import Shape


class Attention(nnx.Module):
    """softmax(QK^T / sqrt(d)) V over H heads (Vaswani et al. 2017): [B, N, D] -> [B, N, D]."""

    def __init__(self, model: config.Model, shape: Shape, rngs: nnx.Rngs):
        width, heads, size = shape.width, shape.heads, shape.width // shape.heads
        self.attention_dropout = model.attention_dropout
        self.projection_dropout = model.dropout if model.projection_dropout is None else model.projection_dropout
        self.implementation = model.attention
        self.tokens, self.algorithm = shape.tokens, model.context_attention
        dense: dict[str, Any] = {"rngs": rngs, "initializer": INITIALIZERS[model.kernel_init]}
        qkv_names, projection_names = ("width", "heads", None), ("heads", None, "width")
        qkv_bias, projection_bias = (0.0 if bias else None for bias in (model.qkv_bias, model.projection_bias))
        self.qkv = Dense((width,), (heads, size), qkv_names, bias=qkv_bias, count=3, **dense)
        self.projection = Dense((heads, size), (width,), projection_names, bias=projection_bias, **dense)
        norm = functools.partial(Norm, model, size, None, rngs=rngs, bias=model.qk_norm_bias)
        self.query_norm = norm() if shape.qk_norm else None
        self.key_norm = norm() if shape.qk_norm else None

    def __call__(
        self,
        x: jax.Array,
        key: jax.Array | None,
        norm: Norm | None = None,
        scale: Scale | None = None,
        rotation: Rotation | None = None,
    ) -> jax.Array:
        """Attends over the tokens of x; `norm` and `scale` are as for a dense layer, `rotation` as for a block."""
        keys = split_key(key, 2)
        q, k, v = self._heads(x, norm, rotation)
        if layout.shard_count("tokens") == 1:
            mixed = attend(q, k, v, self.implementation, self.attention_dropout, keys[0], tokens=self.tokens)
        else:
            mixed = attend_split(q, k, v, self.tokens, self.algorithm, self.implementation, self.attention_dropout)
        return dropout(self._project(mixed, scale), self.projection_dropout, keys[1])

    def weights(self, x: jax.Array, norm: Norm | None = None, rotation: Rotation | None = None) -> jax.Array:
        """Returns the weights with which a call sums values, softmax(QK^T / sqrt(d)): [B, H, N, N], float32.

        The arguments are those of a call. N leaves out padding. The mesh must not split tokens.
        """
        q, k, _ = self._heads(x, norm, rotation)
        return _weights(q[:, : self.tokens], k[:, : self.tokens])

    def _heads(
        self, x: jax.Array, norm: Norm | None, rotation: Rotation | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries, keys and values [B, N, H, d]."""
        q, k, v = (_named(y, "qkv") for y in self.qkv.each(x, norm=norm))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return q, k, v

    def _project(self, mixed: jax.Array, scale: Scale | None) -> jax.Array:
        """Returns the projection of what attention made, [B, N, H, d]."""
        join = functools.partial(layout.joined, start=2)
        if kernels.device()[0] == "tpu":
            return self.projection(join(mixed), scale=scale)  # keeps [B, N, H d], see `_named`
        return self.projection.of(join, mixed, scale=scale)  # keeps [B, N, H, d], as cuDNN does


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    implementation: str,
    rate: float = 0.0,
    key: jax.Array | None = None,
    mask: jax.Array | None = None,
    tokens: int | None = None,
) -> jax.Array:
    """Computes attention over tokens that the mesh does not split.

    Args:
      q: queries [B, Nq, H, d].
      k: keys [B, Nk, H, d].
      v: values [B, Nk, H, d].
      implementation: "xla", "cudnn" or "auto", the device's kernel if one fits, else XLA. A kernel is possible for
        self-attention only, Nq = Nk.
      rate: the probability with which attention weights are dropped.
      key: the randomness for it; None drops nothing.
      mask: bool [Nk], False for keys to leave out; None keeps all. Only XLA applies it.
      tokens: how many of the tokens are real; the rest is padding at the end. None: all.

    Returns:
      [B, Nq, H, d], laid out like the queries.

    Raises:
      ConfigError: `implementation` is "cudnn" and cuDNN does not fit.
    """
    kernel = kernels.chosen(q, implementation, drops=bool(rate) and key is not None)
    tokens = k.shape[1] if tokens is None else tokens
    if kernel == "cudnn":  # keeps its result itself
        return kernels.run(kernel, q, k, v, tokens)
    if kernel is not None:
        return _named(kernels.run(kernel, q, k, v, tokens), "attention")
    if tokens < k.shape[1]:
        mask = jnp.arange(k.shape[1]) < tokens
    weights = dropout(_weights(q, k, mask).astype(v.dtype), rate, key)
    return _named(jnp.einsum("bhqk,bkhd->bqhd", weights, v, out_sharding=layout.spec_of(q)), "attention")


def attend_split(
    q: jax.Array, k: jax.Array, v: jax.Array, tokens: int, algorithm: str, implementation: str, rate: float
) -> jax.Array:
    """Computes self-attention over tokens that the mesh splits.

    Args:
      q: queries [B, N, H, d], split by tokens.
      k: keys, likewise.
      v: values, likewise.
      tokens: how many of the N tokens are real; the rest is padding at the end.
      algorithm: "ring" or "all_to_all".
      implementation: as in `attend`; a kernel is possible inside all-to-all attention only.
      rate: the probability of dropped attention weights, which must be 0.

    Returns:
      [B, N, H, d], laid out like the queries.

    Raises:
      ConfigError: the algorithm does not support one of the other arguments.
    """
    context.check(algorithm, implementation, q.shape[2], rate, dict(jax.sharding.get_abstract_mesh().shape))
    if algorithm == "ring":
        return context.ring_attention(q, k, v, tokens)

    def local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        kernel = kernels.chosen(q, implementation, drops=False)
        return context.chunked_attention(q, k, v, tokens) if kernel is None else kernels.run(kernel, q, k, v, tokens)

    return _named(context.all_to_all_attention(q, k, v, local), "attention")


def _weights(q: jax.Array, k: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Returns the weights [B, H, Nq, Nk] of queries [B, Nq, H, d] and keys [B, Nk, H, d], float32; mask as above."""
    scores = _scores(q * q.shape[-1] ** -0.5, k)
    if mask is not None:
        scores = jnp.where(mask, scores, context.MASKED)
    return jax.nn.softmax(scores, axis=-1)


@jax.custom_vjp
def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Multiplies queries [B, Nq, H, d] by keys [B, Nk, H, d] to scores [B, H, Nq, Nk] in float32, for any input dtype.

    If it were rounded to bfloat16 before the softmax, a score of 20 would be off by up to 0.06, and its weight by 6 %.
    The gradients are products in the dtype of queries and keys, whereas JAX's own would multiply float32 by bfloat16;
    in bfloat16 their error is 1.4 times that of JAX's own, 0.23 % instead of 0.16 %.
    """
    return jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)


def _scores_forward(q: jax.Array, k: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _scores(q, k), (q, k)


def _scores_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, k = saved
    g = g.astype(q.dtype)
    q_gradient = jnp.einsum("bhqk,bkhd->bqhd", g, k, out_sharding=layout.spec_of(q))
    return q_gradient, jnp.einsum("bhqk,bqhd->bkhd", g, q, out_sharding=layout.spec_of(k))


_scores.defvjp(_scores_forward, _scores_backward)


def _named(x: jax.Array, name: str) -> jax.Array:
    """Returns x [B, N, H, d], named for `remat` as [B, N, H d]: in memory a TPU pads heads of 64 channels to 128."""
    return jax.lax.reshape(checkpoint_name(layout.joined(x, 2), name), x.shape, out_sharding=layout.spec_of(x))

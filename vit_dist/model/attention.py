"""Multi-head self-attention, split by heads over `tensor`, computed by the fastest means the hardware has.

`attend` is the one function that meets hardware: plain einsums that XLA fuses (CPU, TPU, and wherever attention
weights are dropped), or cuDNN's fused kernel on NVIDIA GPUs, which never writes the [N, N] weights to memory. cuDNN
knows nothing of Explicit meshes and its backward refuses odd sequence lengths, so it runs inside `jax.shard_map`
over batch and heads, on tokens padded to an even number whose padding is masked out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vit_dist.config import ConfigError
from vit_dist.mesh import layout
from vit_dist.model.layers import Dense, Norm, dropout, split_key

HEADS = ("batch", None, "heads", None)  # of queries, keys and values: [B, N, H, d]


class Attention(nnx.Module):
    """softmax(QK^T / sqrt(d)) V over `heads` heads (Vaswani et al. 2017): [B, N, D] -> [B, N, D]."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
        initializer: Callable,
        qkv_bias: bool,
        projection_bias: bool,
        qk_norm: bool,
        attention_dropout: float,
        projection_dropout: float,
        implementation: str,
    ):
        size = width // heads
        self.attention_dropout = attention_dropout
        self.projection_dropout = projection_dropout
        self.implementation = implementation
        dense: dict[str, Any] = {"rngs": rngs, "initializer": initializer}
        self.qkv = Dense(
            (width,), (3, heads, size), ("width", None, "heads", None), bias=0.0 if qkv_bias else None, **dense
        )
        names = ("heads", None, "width")
        self.projection = Dense((heads, size), (width,), names, bias=0.0 if projection_bias else None, **dense)
        self.query_norm = Norm(size, None, rngs=rngs, bias=False) if qk_norm else None
        self.key_norm = Norm(size, None, rngs=rngs, bias=False) if qk_norm else None

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        keys = split_key(key, 2)
        qkv = checkpoint_name(self.qkv(x), "qkv")
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q, HEADS), self.key_norm(k, HEADS)
        mixed = attend(q, k, v, self.implementation, self.attention_dropout, keys[0])
        y = self.projection(checkpoint_name(mixed, "attention"))
        return dropout(y, self.projection_dropout, keys[1], ("batch", None, None))


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, implementation: str, rate: float = 0.0, key: jax.Array | None = None
) -> jax.Array:
    """Attention of queries [B, Nq, H, d] over keys and values [B, Nk, H, d] -> [B, Nq, H, d].

    implementation: "xla", "cudnn", or "auto": cuDNN on a GPU in bfloat16 when no weights are dropped, else XLA. "cudnn"
    is for self-attention (Nq = Nk) and raises `ConfigError` where "auto" would take XLA.
    """
    drops = bool(rate) and key is not None
    fits = _on_gpu() and q.dtype == jnp.bfloat16 and q.shape[-1] % 8 == 0 and not drops
    if implementation == "cudnn" and not fits:
        raise ConfigError(
            "model.attention: cudnn needs an NVIDIA GPU, heads of a multiple of 8, model.dtype=bfloat16 and "
            "model.attention_dropout=0; take auto"
        )
    if implementation == "cudnn" or (implementation == "auto" and fits):
        return _cudnn(q, k, v)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(v.dtype)
    weights = dropout(weights, rate, key, ("batch", "heads", None, None))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    part = layout.spec(*HEADS)
    if part is None:
        return _cudnn_local(q, k, v)
    return jax.shard_map(_cudnn_local, in_specs=(part, part, part), out_specs=part, check_vma=False)(q, k, v)


def _cudnn_local(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One device's examples and heads: [b, N, h, d] three times -> [b, N, h, d]."""
    examples, tokens = q.shape[:2]
    if tokens % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    q, k, v = (jnp.pad(t, ((0, 0), (0, 1), (0, 0), (0, 0))) for t in (q, k, v))
    lengths = jnp.full((examples,), tokens, jnp.int32)
    padded = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return padded[:, :tokens]


def _on_gpu() -> bool:
    """Whether the program is for an NVIDIA GPU: the kind of device of the mesh in use, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else jax.default_backend()
    return platform in ("gpu", "cuda")

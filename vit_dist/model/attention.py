"""Multi-head self-attention, split by heads over `tensor`, computed by the fastest means the hardware has.

`attend` is the one function that meets hardware: plain einsums that XLA fuses (CPU, TPU, and wherever attention
weights are dropped), or cuDNN's fused kernel on NVIDIA GPUs, which never writes the [N, N] weights to memory. cuDNN
knows nothing of Explicit meshes and its backward refuses odd sequence lengths, so it runs inside `jax.shard_map`
over batch and heads, on tokens padded to an even number whose padding is masked out.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vit_dist.config import ConfigError
from vit_dist.mesh import layout
from vit_dist.model.layers import Dense, Norm, dropout, split

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
        dense = {"rngs": rngs, "initializer": initializer}
        names = ("width", None, "heads", None)
        self.qkv = Dense((width,), (3, heads, size), names, bias=0.0 if qkv_bias else None, **dense)
        names = ("heads", None, "width")
        self.projection = Dense((heads, size), (width,), names, bias=0.0 if projection_bias else None, **dense)
        self.query_norm = Norm(size, None, rngs=rngs, bias=False) if qk_norm else None
        self.key_norm = Norm(size, None, rngs=rngs, bias=False) if qk_norm else None

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        keys = split(key, 2)
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

    implementation: "xla", "cudnn", or "auto": cuDNN on a GPU in bfloat16 when no weights are dropped, else XLA.
    """
    drops = bool(rate) and key is not None
    if implementation == "auto":
        fused = _on_gpu() and q.dtype == jnp.bfloat16 and not drops
        implementation = "cudnn" if fused else "xla"
    if implementation == "cudnn":
        if drops:
            raise ConfigError("model.attention: cudnn cannot drop attention weights; set model.attention_dropout=0")
        return _cudnn(q, k, v)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k)
    weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(v.dtype)
    weights = dropout(weights, rate, key, ("batch", "heads", None, None))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    queries, keys = q.shape[1], k.shape[1]
    part = layout.spec(*HEADS)
    local = functools.partial(_cudnn_local, queries=queries, keys=keys)
    if part is None:
        return local(q, k, v)
    return jax.shard_map(local, in_specs=(part, part, part), out_specs=part, check_vma=False)(q, k, v)


def _cudnn_local(q: jax.Array, k: jax.Array, v: jax.Array, *, queries: int, keys: int) -> jax.Array:
    q, k, v = (jnp.pad(t, ((0, 0), (0, t.shape[1] % 2), (0, 0), (0, 0))) for t in (q, k, v))
    lengths = {}
    if queries % 2 or keys % 2:
        lengths = {
            "query_seq_lengths": jnp.full(q.shape[:1], queries, jnp.int32),
            "key_value_seq_lengths": jnp.full(q.shape[:1], keys, jnp.int32),
        }
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **lengths)[:, :queries]


def _on_gpu() -> bool:
    """Whether the program is for an NVIDIA GPU: the kind of device of the mesh in use, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else jax.default_backend()
    return platform in ("gpu", "cuda")

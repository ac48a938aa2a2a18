"""Multi-head self-attention, split by heads over `tensor`, computed by the fastest means the hardware has.

`attend` is the one function that meets hardware: plain einsums that XLA fuses (CPU, TPU, and wherever attention
weights are dropped), or cuDNN's fused kernel on NVIDIA GPUs, which never writes the [N, N] weights to memory. cuDNN
knows nothing of Explicit meshes and its backward refuses odd sequence lengths, so it runs inside `jax.shard_map`
over batch and heads, on tokens padded to an even number whose padding is masked out. Where the mesh splits tokens,
`attend_across` stands in its place, over what `model.context` offers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vit_dist.config import ConfigError
from vit_dist.mesh import layout
from vit_dist.model import context
from vit_dist.model.layers import Dense, Norm, dropout, split_key

# Of cuDNN's kernel on every GPU. Hopper and later take 256, which a program compiled for an absent GPU cannot ask for.
LARGEST_CUDNN_HEAD = 128


class Attention(nnx.Module):
    """softmax(QK^T / sqrt(d)) V over `heads` heads (Vaswani et al. 2017): [B, N, D] -> [B, N, D].

    tokens: how many of the N are real where the mesh splits them; otherwise all are. across: how devices that hold
    parts of them attend, "ring" or "all_to_all".
    """

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
        tokens: int,
        across: str,
    ):
        size = width // heads
        self.attention_dropout = attention_dropout
        self.projection_dropout = projection_dropout
        self.implementation = implementation
        self.tokens, self.across = tokens, across
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
            q, k = self.query_norm(q), self.key_norm(k)
        if layout.parts("tokens") == 1:
            mixed = checkpoint_name(attend(q, k, v, self.implementation, self.attention_dropout, keys[0]), "attention")
        else:
            mixed = attend_across(q, k, v, self.tokens, self.across, self.implementation, self.attention_dropout)
        return dropout(self.projection(mixed), self.projection_dropout, keys[1])


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    implementation: str,
    rate: float = 0.0,
    key: jax.Array | None = None,
    seen: jax.Array | None = None,
) -> jax.Array:
    """Attention of queries [B, Nq, H, d] over keys and values [B, Nk, H, d] -> [B, Nq, H, d], laid out as the queries.

    implementation: "xla", "cudnn", or "auto": cuDNN where `fits_cudnn`, else XLA. "cudnn"
    is for self-attention (Nq = Nk) and raises `ConfigError` where "auto" would take XLA. seen: bool [Nk], for "xla":
    the keys that count.
    """
    if _takes_cudnn(q, implementation, drops=bool(rate) and key is not None):
        return _cudnn(q, k, v, q.shape[1])
    scores = _scores(q * q.shape[-1] ** -0.5, k)
    if seen is not None:
        scores = jnp.where(seen, scores, context.HIDDEN)
    weights = dropout(jax.nn.softmax(scores, axis=-1).astype(v.dtype), rate, key)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, out_sharding=layout.of(q))


def attend_across(
    q: jax.Array, k: jax.Array, v: jax.Array, tokens: int, across: str, implementation: str, rate: float
) -> jax.Array:
    """Self-attention of [B, N, H, d] split by tokens, of which the first `tokens` are real -> [B, N, H, d].

    across: "ring" or "all_to_all", where the whole sequences in between may be cuDNN's. Raises `ConfigError` for what
    cannot be had so, such as a `rate` of dropped weights.
    """
    context.check(across, implementation, q.shape[2], rate, dict(jax.sharding.get_abstract_mesh().shape))
    if across == "ring":
        return context.ring(q, k, v, tokens)
    whole = _cudnn if _takes_cudnn(q, implementation, drops=False) else context.chunked
    mixed = context.all_to_all(q, k, v, lambda q, k, v: whole(q, k, v, tokens))
    return checkpoint_name(mixed, "attention")


def fits_cudnn(*, on_gpu: bool, dtype: str, head_size: int, drops: bool) -> bool:
    """Whether cuDNN has a kernel for heads of this size and dtype; drops: attention weights are dropped."""
    fitting_heads = head_size % 8 == 0 and head_size <= LARGEST_CUDNN_HEAD
    return on_gpu and dtype == "bfloat16" and fitting_heads and not drops


@jax.custom_vjp
def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Products of queries [B, Nq, H, d] and keys [B, Nk, H, d]: [B, H, Nq, Nk] in float32, whatever they come in.

    Rounded to bfloat16 before the softmax, a score of 20 would be off by up to 0.06, and its weight by 6 %. The
    gradients are products in the dtype of queries and keys, where JAX's own would be of float32 with bfloat16.
    """
    return jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)


def _scores_forward(q: jax.Array, k: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _scores(q, k), (q, k)


def _scores_backward(saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, k = saved
    g = g.astype(q.dtype)
    q_gradient = jnp.einsum("bhqk,bkhd->bqhd", g, k, out_sharding=layout.of(q))
    return q_gradient, jnp.einsum("bhqk,bqhd->bkhd", g, q, out_sharding=layout.of(k))


_scores.defvjp(_scores_forward, _scores_backward)


def _takes_cudnn(q: jax.Array, implementation: str, *, drops: bool) -> bool:
    fits = fits_cudnn(on_gpu=_on_gpu(), dtype=q.dtype.name, head_size=q.shape[-1], drops=drops)
    if implementation == "cudnn" and not fits:
        raise ConfigError(
            f"model.attention: cudnn needs an NVIDIA GPU, heads of a multiple of 8 up to {LARGEST_CUDNN_HEAD}, "
            "model.dtype=bfloat16 and model.attention_dropout=0; take auto"
        )
    return implementation != "xla" and fits


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int) -> jax.Array:
    part, local = layout.of(q), functools.partial(_cudnn_local, tokens)
    if part is None:
        return local(q, k, v)
    return jax.shard_map(local, in_specs=(part, part, part), out_specs=part, check_vma=False)(q, k, v)


def _cudnn_local(tokens: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One device's examples and heads: [b, N, h, d] three times, the first `tokens` of them real -> [b, N, h, d]."""
    examples, length = q.shape[:2]
    if length == tokens and tokens % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    q, k, v = (jnp.pad(t, ((0, 0), (0, length % 2), (0, 0), (0, 0))) for t in (q, k, v))
    lengths = jnp.full((examples,), tokens, jnp.int32)
    padded = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    # What the kernel leaves in the rows of padding is not said; a NaN there would spread.
    return jnp.where(jnp.arange(length)[:, None, None] < tokens, padded[:, :length], 0)


def _on_gpu() -> bool:
    """Whether the program is for an NVIDIA GPU: the kind of device of the mesh in use, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else jax.default_backend()
    return platform in ("gpu", "cuda")

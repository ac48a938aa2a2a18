"""Multi-head self-attention, its heads split over `tensor`, with the fastest implementation for the hardware.

`attend` chooses between plain einsums that XLA fuses (CPU, TPU, and wherever attention weights are dropped), and
cuDNN's fused kernel on NVIDIA GPUs, which never writes the [N, N] weights to memory. The cuDNN kernel does not support
Explicit meshes, and its backward pass refuses odd sequence lengths. It therefore runs inside `jax.shard_map` over batch
and heads, on tokens padded to an even number, with the padding masked out. If the mesh splits tokens, `attend_split`
takes the place of `attend`, with the algorithms of `model.context`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.mesh import layout
from vit_dist.model import context
from vit_dist.model.layers import INITIALIZERS, Dense, Norm, Scale, dropout, split_key
from vit_dist.model.shape import Shape

# The largest head of cuDNN's kernel on every GPU. Hopper and later support 256, but a program that is compiled for an
# absent GPU cannot query it.
LARGEST_CUDNN_HEAD = 128


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
        self.query_norm = Norm(size, None, rngs=rngs, bias=False) if shape.qk_norm else None
        self.key_norm = Norm(size, None, rngs=rngs, bias=False) if shape.qk_norm else None

    def __call__(
        self, x: jax.Array, key: jax.Array | None, norm: Norm | None = None, scale: Scale | None = None
    ) -> jax.Array:
        """Attends over the tokens of x; `norm` and `scale` are as for a dense layer."""
        keys = split_key(key, 2)
        q, k, v = (checkpoint_name(y, "qkv") for y in self.qkv.each(x, norm=norm))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if layout.shard_count("tokens") == 1:
            mixed = checkpoint_name(attend(q, k, v, self.implementation, self.attention_dropout, keys[0]), "attention")
        else:
            mixed = attend_split(q, k, v, self.tokens, self.algorithm, self.implementation, self.attention_dropout)
        return dropout(self.projection(mixed, scale=scale), self.projection_dropout, keys[1])


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    implementation: str,
    rate: float = 0.0,
    key: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Computes attention over tokens that the mesh does not split.

    Args:
      q: queries [B, Nq, H, d].
      k: keys [B, Nk, H, d].
      v: values [B, Nk, H, d].
      implementation: "xla", "cudnn" (self-attention only, Nq = Nk) or "auto", which is cuDNN if `fits_cudnn`, else XLA.
      rate: the probability with which attention weights are dropped.
      key: the randomness for it; None drops nothing.
      mask: bool [Nk], False for keys to leave out; None keeps all. Only XLA applies it.

    Returns:
      [B, Nq, H, d], laid out like the queries.

    Raises:
      ConfigError: `implementation` is "cudnn" and cuDNN does not fit.
    """
    if _uses_cudnn(q, implementation, drops=bool(rate) and key is not None):
        return _cudnn(q, k, v, q.shape[1])
    scores = _scores(q * q.shape[-1] ** -0.5, k)
    if mask is not None:
        scores = jnp.where(mask, scores, context.MASKED)
    weights = dropout(jax.nn.softmax(scores, axis=-1).astype(v.dtype), rate, key)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, out_sharding=layout.spec_of(q))


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
      implementation: as in `attend`; cuDNN is possible inside all-to-all attention only.
      rate: the probability of dropped attention weights, which must be 0.

    Returns:
      [B, N, H, d], laid out like the queries.

    Raises:
      ConfigError: the algorithm does not support one of the other arguments.
    """
    context.check(algorithm, implementation, q.shape[2], rate, dict(jax.sharding.get_abstract_mesh().shape))
    if algorithm == "ring":
        return context.ring_attention(q, k, v, tokens)
    local = _cudnn if _uses_cudnn(q, implementation, drops=False) else context.chunked_attention
    mixed = context.all_to_all_attention(q, k, v, lambda q, k, v: local(q, k, v, tokens))
    return checkpoint_name(mixed, "attention")


def fits_cudnn(*, on_gpu: bool, dtype: str, head_size: int, drops: bool) -> bool:
    """Returns whether cuDNN has a kernel for this dtype and head size; `drops`: attention weights are dropped."""
    fitting_heads = head_size % 8 == 0 and head_size <= LARGEST_CUDNN_HEAD
    return on_gpu and dtype == "bfloat16" and fitting_heads and not drops


@jax.custom_vjp
def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Multiplies queries [B, Nq, H, d] by keys [B, Nk, H, d] to scores [B, H, Nq, Nk] in float32, for any input dtype.

    If it were rounded to bfloat16 before the softmax, a score of 20 would be off by up to 0.06, and its weight by 6 %.
    The gradients are products in the dtype of queries and keys, whereas JAX's own would multiply float32 by bfloat16.
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


def _uses_cudnn(q: jax.Array, implementation: str, *, drops: bool) -> bool:
    fits = fits_cudnn(on_gpu=_on_gpu(), dtype=q.dtype.name, head_size=q.shape[-1], drops=drops)
    if implementation == "cudnn" and not fits:
        raise ConfigError(
            f"model.attention: cudnn needs an NVIDIA GPU, heads of a multiple of 8 up to {LARGEST_CUDNN_HEAD}, "
            "model.dtype=bfloat16 and model.attention_dropout=0; take auto"
        )
    return implementation != "xla" and fits


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int) -> jax.Array:
    """Runs `_cudnn_local` on every device's examples and heads."""
    split, local = layout.spec_of(q), functools.partial(_cudnn_local, tokens)
    if split is None:
        return local(q, k, v)
    return jax.shard_map(local, in_specs=(split, split, split), out_specs=split, check_vma=False)(q, k, v)


def _cudnn_local(tokens: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Computes one device's attention, [b, N, h, d], of q, k, v [b, N, h, d] whose first `tokens` are real."""
    examples, length = q.shape[:2]
    if length == tokens and tokens % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    q, k, v = (jnp.pad(t, ((0, 0), (0, length % 2), (0, 0), (0, 0))) for t in (q, k, v))
    lengths = jnp.full((examples,), tokens, jnp.int32)
    padded = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    # The kernel's output in rows of padding is undefined; a NaN there would spread.
    return jnp.where(jnp.arange(length)[:, None, None] < tokens, padded[:, :length], 0)


def _on_gpu() -> bool:
    """Returns whether the program is for NVIDIA GPUs: those of the mesh in use, which may be absent from this host."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = device.platform if device is not None else jax.default_backend()
    return platform in ("gpu", "cuda")

"""The fused kernels of attention, which never write the [N, N] weights to memory, and the choice of one for a device.

NVIDIA's GPUs have cuDNN's kernel, TPUs that of `tpu_attention`. Where neither fits, XLA computes attention from plain
einsums. What half a block (queries, keys, values, attention, projection and their gradients) moves through a TPU's
memory, in MB by the compiled programs, beside XLA and jax's own kernel, splash attention, with its fused backward pass:

    chip  heads, tokens, examples   this kernel     XLA   splash
    v5e   6 x 64, 196, 128                  456    1,965   2,145
    v5e   12 x 64, 196, 64                  456    2,087       -
    v5e   12 x 64, 576, 16                  252    3,070   1,374
    v5e   12 x 64, 1024, 8                  193    4,148     656
    v5e   12 x 64, 4096, 2                  193   15,650     950
    v5e   16 x 80, 256, 16                  189      462     328
    v6e   12 x 64, 196, 64                  456    2,246   2,296
    v5p   12 x 64, 196, 64                  997    2,670       -

Neither kernel supports Explicit meshes, so both run inside `jax.shard_map`, on a device's examples and heads.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.mesh import layout
from vit_dist.model import tpu_attention
from vit_dist.model.shape import shape_of

Kernel = Literal["cudnn", "pallas"]

# The largest head of cuDNN's kernel on every GPU. Hopper and later support 256, but a program that is compiled for an
# absent GPU cannot query it.
LARGEST_CUDNN_HEAD = 128


def fitting(
    *, platform: str, kind: str, dtype: str, tokens: int, heads: int, head_size: int, drops: bool
) -> Kernel | None:
    """Returns the kernel that computes self-attention on a device; None if XLA has to.

    Args:
      platform: of the device: "gpu", "tpu" or "cpu", as in `jax.Device.platform`.
      kind: the device's `device_kind`.
      dtype: of queries, keys and values.
      tokens: their number, N.
      heads: those of one device.
      head_size: the channels of a head.
      drops: whether attention weights are dropped.
    """
    if dtype != "bfloat16" or drops:
        return None
    if platform in ("gpu", "cuda"):
        return "cudnn" if head_size % 8 == 0 and head_size <= LARGEST_CUDNN_HEAD else None
    if platform == "tpu" and tpu_attention.fits(tokens, heads, head_size, kind):
        return "pallas"
    return None


def implementation(
    model: config.Model, platform: str, kind: str, *, head_shards: int = 1, token_shards: int = 1
) -> str:
    """Returns what computes a model's attention: "xla", a kernel, or "chunked" (`model.context`).

    Args:
      model: the config.
      platform: as in `fitting`.
      kind: as in `fitting`.
      head_shards: the number of devices that heads are split over.
      token_shards: the number of devices that tokens are split over.
    """
    if token_shards > 1 and model.context_attention == "ring":
        return "chunked"
    shape = shape_of(model)
    kernel = fitting(
        platform=platform,
        kind=kind,
        dtype=model.dtype,
        tokens=shape.tokens,
        heads=shape.heads // (head_shards * token_shards),
        head_size=shape.width // shape.heads,
        drops=model.attention_dropout > 0,
    )
    if kernel is not None and model.attention != "xla":
        return kernel
    return "chunked" if token_shards > 1 else "xla"


def padded_length(model: config.Model, platform: str, kind: str, *, head_shards: int = 1) -> int:
    """Returns the number of tokens that blocks hold, with padding at the end, on a mesh that does not split them.

    cuDNN's backward pass refuses odd numbers. One token more from the embedding on spares a copy of queries, keys and
    values, and of their gradients, in every block. The arguments are those of `implementation`.
    """
    tokens = shape_of(model).tokens
    by_cudnn = implementation(model, platform, kind, head_shards=head_shards) == "cudnn"
    return tokens + tokens % 2 if by_cudnn else tokens


def chosen(q: jax.Array, implementation: str, *, drops: bool) -> Kernel | None:
    """Returns the kernel for queries [B, N, H, d] by `model.attention` and the mesh in use; see `fitting`.

    Raises:
      ConfigError: `implementation` is "cudnn" and cuDNN does not fit.
    """
    platform, kind = device()
    heads = q.shape[2] // layout.shard_count_of(layout.spec_of(q), 2)
    kernel = fitting(
        platform=platform,
        kind=kind,
        dtype=q.dtype.name,
        tokens=q.shape[1],
        heads=heads,
        head_size=q.shape[3],
        drops=drops,
    )
    if implementation == "cudnn" and kernel != "cudnn":
        raise ConfigError(
            f"model.attention: cudnn needs an NVIDIA GPU, heads of a multiple of 8 up to {LARGEST_CUDNN_HEAD}, "
            "model.dtype=bfloat16 and model.attention_dropout=0; take auto"
        )
    return None if implementation == "xla" else kernel


def run(kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, tokens: int) -> jax.Array:
    """Computes self-attention of q, k, v [B, N, H, d] whose first `tokens` are real, on every device's part of them."""
    local = functools.partial({"cudnn": _cudnn, "pallas": tpu_attention.attend_locally}[kernel], tokens=tokens)
    split = layout.spec_of(q)
    if split is None:
        return local(q, k, v)
    return jax.shard_map(local, in_specs=(split, split, split), out_specs=split, check_vma=False)(q, k, v)


def device() -> tuple[str, str]:
    """Returns platform and kind of the devices of the mesh in use, which may be absent from this host."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.platform, abstract.device_kind
    first = jax.devices()[0]
    return first.platform, first.device_kind


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int) -> jax.Array:
    """Computes one device's attention by cuDNN, whose backward pass refuses odd numbers of tokens.

    Only keys of padding are left out, so that a row of padding gets numbers that nobody reads. Were it left out as a
    query, its result would be undefined, and zeros in its place cost two more passes over memory.
    """
    examples, length = q.shape[:2]
    if length == tokens and tokens % 2 == 0:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    q, k, v = (jnp.pad(t, ((0, 0), (0, length % 2), (0, 0), (0, 0))) for t in (q, k, v))
    queries, keys = (jnp.full((examples,), count, jnp.int32) for count in (q.shape[1], tokens))
    padded = jax.nn.dot_product_attention(
        q, k, v, query_seq_lengths=queries, key_value_seq_lengths=keys, implementation="cudnn"
    )
    return padded[:, :length]

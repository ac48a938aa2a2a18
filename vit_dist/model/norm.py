"""Normalisation over channels, and LayerScale, which both leave their factors to the dense layer beside them.

Products of (x s + b) and a kernel W are those of x and s W, plus b W. The gradients of s and b then follow from the
kernel's, without a sum over all tokens.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn import initializers

from vit_dist import config
from vit_dist.mesh import layout
from vit_dist.model import kernels
from vit_dist.model.parameters import cast_and_gather, make_parameter
from vit_dist.model.recompute import recompute


class Norm(nnx.Module):
    """Normalises over the last dimension, with statistics in float32: [..., size] -> [..., size].

    It is LayerNorm (Ba et al. 2016, arXiv:1607.06450), or RMSNorm, which subtracts no mean and has no bias (Zhang &
    Sennrich 2019, arXiv:1910.07467). Where a dense layer follows, it can leave its scale and bias to it (`normalise`,
    `fold`).

    Args:
      model: `norm` is the kind, `norm_epsilon` what is added to the variance.
      size: of the last dimension.
      name: its logical name.
      rngs: needed to make parameters, though none is random.
      bias: whether a LayerNorm has one.
    """

    def __init__(self, model: config.Model, size: int, name: str | None, *, rngs: nnx.Rngs, bias: bool = True):
        self.kind, self.epsilon = model.norm, model.norm_epsilon
        bias = bias and model.norm == "layernorm"
        self.scale = make_parameter(rngs, initializers.ones, (size,), (name,))
        self.bias = make_parameter(rngs, initializers.zeros, (size,), (name,)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return recompute(functools.partial(_normalised, self.kind, self.epsilon), x, *self._gathered(x))

    def normalise(self, x: jax.Array) -> jax.Array:
        """Returns x without scale and bias, for a dense layer that is called with this norm."""
        return recompute(functools.partial(_normalised, self.kind, self.epsilon), x)

    def affine(self, x: jax.Array) -> jax.Array:
        """Returns x times the scale, plus the bias."""
        return _affine(x.astype(jnp.float32), *self._gathered(x)).astype(x.dtype)

    def _gathered(self, x: jax.Array) -> list[jax.Array]:
        """Returns the scale and, if there is one, the bias, in float32 and gathered for x."""
        parameters = [self.scale] if self.bias is None else [self.scale, self.bias]
        return [cast_and_gather(parameter, jnp.float32, layout.spec_of(x)) for parameter in parameters]

    def fold(self, kernel: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns the kernel [size, ...] of a dense layer that maps what `normalise` returns, and a bias [...] to add.

        Both are as stored. The bias is a sum over `fsdp`, a small all-reduce; None if the norm has no bias.
        """
        scaled = recompute(lambda kernel, scale: _scaled(kernel, scale, 0), kernel, self.scale[...])
        if self.bias is None:
            return scaled, None
        shift = recompute(lambda kernel, bias: jnp.sum(_scaled(kernel, bias, 0), 0), kernel, self.bias[...])
        return scaled, shift


def _normalised(kind: str, epsilon: float, x: jax.Array, *affine: jax.Array) -> jax.Array:
    """Normalises x over its last dimension; `affine`: scale and bias, or the scale alone, or neither.

    For [B, N, D] XLA's compiler for GPUs cuts the backward pass into tiles of 16 tokens, which do not fit into a
    multiprocessor's registers, and of [B N, D] into tiles of 2: on an H100 a norm of B/16 then takes 0.10 ms for 256
    images instead of 0.24.
    """
    rows = x
    if kernels.device()[0] in ("gpu", "cuda") and x.ndim == 3 and layout.shard_count_of(layout.spec_of(x), 1) == 1:
        rows = layout.joined(x, 0, 2)
    y = _affine(STANDARDISED[kind](rows.astype(jnp.float32), epsilon), *affine).astype(x.dtype)
    return jax.lax.reshape(y, x.shape, out_sharding=layout.spec_of(x))


def _affine(x: jax.Array, *affine: jax.Array) -> jax.Array:
    """Returns x times the scale, plus the bias; `affine` is as for `_normalised`."""
    split = layout.spec_of(x)
    if affine:
        x = x * layout.broadcast(affine[0], x.shape, split)
    if affine[1:]:
        x = x + layout.broadcast(affine[1], x.shape, split)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _standardised(x: jax.Array, epsilon: float) -> jax.Array:
    """Returns (x - mean) / sqrt(variance + epsilon) over the last dimension of x, float32.

    Its gradient is one array, to which that of the residual stream is added. JAX's own ends with the addition of a
    broadcast number for each token, and XLA for CPUs then computes the stream's gradient anew, from the last block on,
    wherever it is used.
    """
    return _standardised_forward(x, epsilon)[0]


def _standardised_forward(x: jax.Array, epsilon: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    centred = x - jnp.mean(x, -1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + epsilon)
    y = centred * inverse
    return y, (y, inverse)


def _standardised_backward(epsilon: float, saved: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array]:
    y, inverse = saved
    along = jnp.mean(g * y, -1, keepdims=True)
    return ((g - (y * along + jnp.mean(g, -1, keepdims=True))) * inverse,)


_standardised.defvjp(_standardised_forward, _standardised_backward)


def _divided_by_rms(x: jax.Array, epsilon: float) -> jax.Array:
    """Returns x / sqrt(mean square + epsilon) over the last dimension of x, float32."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + epsilon)


STANDARDISED: dict[str, Callable] = {"layernorm": _standardised, "rmsnorm": _divided_by_rms}  # `model.norm`


class Scale(nnx.Module):
    """LayerScale: multiplies each channel by a learned factor (Touvron et al. 2021, arXiv:2103.17239).

    The dense layer before it applies it: the columns of the kernel are multiplied instead of the activations.
    """

    def __init__(self, size: int, value: float, *, rngs: nnx.Rngs):
        self.scale = make_parameter(rngs, initializers.constant(value), (size,), ("width",))

    def fold(self, kernel: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Returns kernel [..., size] and bias [size] of the dense layer whose result is to be scaled, as stored."""
        scale = self.scale[...]
        kernel = recompute(lambda kernel, scale: _scaled(kernel, scale, kernel.ndim - 1), kernel, scale)
        return kernel, None if bias is None else bias * scale


def _scaled(kernel: jax.Array, factors: jax.Array, dimension: int) -> jax.Array:
    """Multiplies a kernel by factors along one dimension; both are as stored."""
    split = layout.stored_spec(kernel)
    return kernel * jax.lax.broadcast_in_dim(factors, kernel.shape, (dimension,), out_sharding=split)

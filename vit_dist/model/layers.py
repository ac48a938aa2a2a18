"""The layers of a Vision Transformer: dense, norms, MLP, dropout and drop-path, with their initialisers.

A layer stores its parameters in float32, split by the table in `mesh.layout`, and gathers them in the dtype of its
input when it runs. Randomness comes as a `key` argument; without a key (evaluation) every random layer is the identity.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers
from jax.sharding import PartitionSpec

from vit_dist.mesh import layout

Names = tuple[str | None, ...]


def make_parameter(rngs: nnx.Rngs, initializer: Callable, shape: tuple[int, ...], names: Names) -> nnx.Param:
    """Makes a float32 parameter that is split by the logical names of its dimensions."""
    return nnx.Param(initializer(rngs.params(), shape, jnp.float32, out_sharding=layout.spec(*names)))


def cast_and_gather(parameter: nnx.Param, dtype: jnp.dtype, activations: PartitionSpec | None) -> jax.Array:
    """Returns the parameter's value in `dtype`, gathered for a product with activations of this layout.

    The cast comes first, so that a gather in bfloat16 moves half the bytes.
    """
    return layout.gathered(parameter[...].astype(dtype), activations)


class Dense(nnx.Module):
    """Maps the last `len(inputs)` dimensions linearly: [..., *inputs] -> [..., *outputs].

    Args:
      inputs: sizes of the dimensions to contract.
      outputs: sizes of the dimensions to make; the kernel is [*inputs, *outputs].
      names: the logical names of all these dimensions, inputs first.
      rngs: the source of randomness for the kernel.
      initializer: maps (fan in, fan out) to an initialiser, such as `xavier_uniform`.
      bias: the initial value of the bias; None makes no bias.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        names: Names,
        *,
        rngs: nnx.Rngs,
        initializer: Callable,
        bias: float | None = 0.0,
    ):
        self.input_count = len(inputs)
        bias_names = names[len(inputs) :]
        # The names of the result's dimensions: only parameters are split by `width`, activations never.
        self.output_names = tuple(None if name == "width" else name for name in bias_names)
        self.kernel = make_parameter(rngs, initializer(*_fans(inputs, outputs)), inputs + outputs, names)
        self.bias = None if bias is None else make_parameter(rngs, initializers.constant(bias), outputs, bias_names)

    def __call__(self, x: jax.Array) -> jax.Array:
        split = layout.spec_of(x, x.ndim - self.input_count, *self.output_names)
        y = _product(x, cast_and_gather(self.kernel, x.dtype, split), self.input_count, split)
        if self.bias is None:
            return y
        return y + layout.broadcast(cast_and_gather(self.bias, x.dtype, split), y.shape, split)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, kernel: jax.Array, inputs: int, split: PartitionSpec | None) -> jax.Array:
    """Multiplies x [..., *inputs] by a gathered kernel [*inputs, *outputs] -> [..., *outputs], laid out as `split`.

    The gradients are JAX's own except in one choice. The kernel's gradient is a product over examples and tokens, and
    here its narrower operand comes first: XLA transposes the first operand on CPUs, and in JAX that is always `g`.
    """
    contract = (tuple(range(x.ndim - inputs, x.ndim)), tuple(range(inputs)))
    return jax.lax.dot_general(x, kernel, (contract, ((), ())), out_sharding=split)


def _product_forward(
    x: jax.Array, kernel: jax.Array, inputs: int, split: PartitionSpec | None
) -> tuple[jax.Array, tuple]:
    return _product(x, kernel, inputs, split), (x, kernel)


def _product_backward(
    inputs: int, split: PartitionSpec | None, saved: tuple, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    lead = tuple(range(x.ndim - inputs))
    contract = (tuple(range(len(lead), g.ndim)), tuple(range(inputs, kernel.ndim)))
    x_gradient = jax.lax.dot_general(g, kernel, (contract, ((), ())), out_sharding=layout.spec_of(x))
    if math.prod(kernel.shape[:inputs]) <= math.prod(kernel.shape[inputs:]):
        return x_gradient, jax.lax.dot_general(
            x, g, ((lead, lead), ((), ())), out_sharding=layout.gradient_spec(kernel, range(kernel.ndim))
        )
    order = (*range(inputs, kernel.ndim), *range(inputs))  # the kernel's dimensions: outputs, then inputs
    transposed = jax.lax.dot_general(g, x, ((lead, lead), ((), ())), out_sharding=layout.gradient_spec(kernel, order))
    # Without the barrier XLA fuses the transpose into the product, which then misses the fast CPU routine.
    transposed = jax.lax.optimization_barrier(transposed)
    return x_gradient, transposed.transpose(*(order.index(dimension) for dimension in range(kernel.ndim)))


_product.defvjp(_product_forward, _product_backward)


class Norm(nnx.Module):
    """LayerNorm over the last dimension, with statistics in float32: [..., size] -> [..., size].

    Ba et al. 2016, arXiv:1607.06450. `name` is the logical name of the dimension.
    """

    def __init__(self, size: int, name: str | None, *, rngs: nnx.Rngs, bias: bool = True, epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.scale = make_parameter(rngs, initializers.ones, (size,), (name,))
        self.bias = make_parameter(rngs, initializers.zeros, (size,), (name,)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide, split = x.astype(jnp.float32), layout.spec_of(x)
        mean = jnp.mean(wide, -1, keepdims=True)
        variance = jnp.mean(jnp.square(wide - mean), -1, keepdims=True)
        y = (wide - mean) * jax.lax.rsqrt(variance + self.epsilon)
        y = y * layout.broadcast(cast_and_gather(self.scale, wide.dtype, split), x.shape, split)
        if self.bias is not None:
            y = y + layout.broadcast(cast_and_gather(self.bias, wide.dtype, split), x.shape, split)
        return y.astype(x.dtype)


class Scale(nnx.Module):
    """LayerScale: multiplies each channel by a learned factor (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, size: int, value: float, *, rngs: nnx.Rngs):
        self.scale = make_parameter(rngs, initializers.constant(value), (size,), ("width",))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = checkpoint_name(x, "scaled")  # a dense product that the factor's gradient needs
        split = layout.spec_of(x)
        return x * layout.broadcast(cast_and_gather(self.scale, x.dtype, split), x.shape, split)


class Mlp(nnx.Module):
    """Applies two dense layers with an activation in between: [B, N, D] -> [B, N, D].

    The activation `swiglu` gates the hidden units: `down(silu(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202).
    """

    def __init__(
        self, width: int, hidden: int, *, activation: str, dropout: float, rngs: nnx.Rngs, initializer: Callable
    ):
        self.activation = activation
        self.dropout = dropout
        dense: dict[str, Any] = {"rngs": rngs, "initializer": initializer}
        self.gate = Dense((width,), (hidden,), ("width", "mlp"), **dense) if activation == "swiglu" else None
        self.up = Dense((width,), (hidden,), ("width", "mlp"), **dense)
        self.down = Dense((hidden,), (width,), ("mlp", "width"), **dense)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        keys = split_key(key, 2)
        hidden = checkpoint_name(self.up(x), "mlp")
        if self.gate is not None:
            hidden = jax.nn.silu(checkpoint_name(self.gate(x), "mlp")) * hidden
        else:
            hidden = jax.nn.gelu(hidden, approximate=self.activation == "gelu_tanh")
        hidden = dropout(hidden, self.dropout, keys[0])
        return dropout(self.down(hidden), self.dropout, keys[1])


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """Splits a key into `count` keys; None gives as many Nones."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes elements of x [B, N, ...] with probability `rate` and scales the rest up (Srivastava et al. 2014).

    The mask is one draw over the global array, of which every device makes its own shard, so that it is the same on
    every mesh. The token axis comes first in the draw: an element's random number then depends only on its position in
    row-major order, and padding tokens at the end, which some meshes need, do not change the mask of those before.
    """
    if not rate or key is None:
        return x
    split = layout.spec_of(x)
    if split is not None:
        split = PartitionSpec(split[1], split[0], *split[2:])
    shape = (x.shape[1], x.shape[0], *x.shape[2:])
    keep = jax.random.bernoulli(key, 1 - rate, shape, out_sharding=split).swapaxes(0, 1)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


def drop_path(x: jax.Array, rate: jax.Array | float | None, key: jax.Array | None) -> jax.Array:
    """Stochastic depth: zeroes the residual branch x [B, ...] of some examples and scales the others up.

    `rate` is the probability, which may be a traced value; None never drops. Huang et al. 2016, arXiv:1603.09382.
    """
    if rate is None or key is None:
        return x
    shape, rest = (x.shape[0],) + (1,) * (x.ndim - 1), (None,) * (x.ndim - 1)
    draws = jax.random.uniform(key, shape, out_sharding=layout.spec_of(x, 1, *rest))
    return x * ((draws >= rate) / (1 - rate)).astype(x.dtype)


def _fans(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[int, int]:
    """Returns fan in and fan out of a kernel [*inputs, *outputs] as a matrix.

    A fused kernel, such as the [D, 3, H, d] of queries, keys and values, is several matrices side by side: the 3
    does not count.
    """
    return math.prod(inputs), math.prod(outputs[1:] if len(outputs) == 3 else outputs)


def zeros(fan_in: int, fan_out: int) -> Callable:
    """Zeros, for any fans."""
    return initializers.zeros


def xavier_uniform(fan_in: int, fan_out: int) -> Callable:
    """Uniform between -a and a, where a = sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio 2010)."""
    limit = math.sqrt(6 / (fan_in + fan_out))
    return lambda key, shape, dtype, out_sharding: jax.random.uniform(
        key, shape, dtype, -limit, limit, out_sharding=out_sharding
    )


def normal(fan_in: int, fan_out: int) -> Callable:
    """Normal with standard deviation 0.02 for any fans, as in BERT, timm and DeiT."""
    return initializers.normal(0.02)


def lecun_normal(fan_in: int, fan_out: int) -> Callable:
    """Normal with variance 1 / fan_in, truncated at two standard deviations (LeCun et al. 1998)."""
    deviation = math.sqrt(1 / fan_in) / 0.87962566103423978  # the deviation of a truncated unit normal
    return lambda key, shape, dtype, out_sharding: (
        deviation * jax.random.truncated_normal(key, -2, 2, shape, dtype, out_sharding=out_sharding)
    )


INITIALIZERS = {"xavier_uniform": xavier_uniform, "lecun_normal": lecun_normal, "normal": normal}  # `model.kernel_init`

"""The layers of a Vision Transformer: dense, norms, MLP, dropout and drop-path, with their initialisers.

A layer stores its parameters in float32, split by the table in `mesh.layout`, and gathers them in the dtype of its
input when it runs. Randomness comes as a `key` argument; without a key (evaluation) every random layer is the identity.
"""

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
from vit_dist.model.activations import ACTIVATIONS
from vit_dist.model.norm import Norm, Scale
from vit_dist.model.parameters import Names, make_parameter
from vit_dist.model.product import product, products


class Dense(nnx.Module):
    """Maps the last dimension linearly: [..., I] -> [..., *outputs], where I is the product of `inputs`.

    Args:
      inputs: sizes of the dimensions to contract, which the argument of a call has joined to one.
      outputs: sizes of the dimensions to make; the kernel is [*inputs, *outputs].
      names: the logical names of all these dimensions, inputs first.
      rngs: the source of randomness for the kernel.
      initializer: maps (fan in, fan out) to an initialiser, such as `xavier_uniform`.
      bias: the initial value of the bias; None makes no bias.
      count: how many such maps of the same input are stored together (see `each`), in a kernel
        [*inputs, count, *outputs].
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
        count: int | None = None,
    ):
        self.input_count, self.outputs = len(inputs), outputs
        self.inputs, self.names, self.count = inputs, names, count
        self.lora: Any = None  # an adapter, see `model.lora`
        input_names, output_names = names[: len(inputs)], names[len(inputs) :]
        stack, stack_names = ((), ()) if count is None else ((count,), (None,))
        make_kernel = initializer(math.prod(inputs), math.prod(outputs))
        kernel_names = (*input_names, *stack_names, *output_names)
        self.kernel = make_parameter(rngs, make_kernel, (*inputs, *stack, *outputs), kernel_names)
        make_bias, bias_names = initializers.constant(bias or 0.0), (*stack_names, *output_names)
        self.bias = None if bias is None else make_parameter(rngs, make_bias, (*stack, *outputs), bias_names)
        # The names of the result's dimensions: only parameters are split by `width`, activations never.
        self.output_names = tuple(None if name == "width" else name for name in output_names)

    def __call__(self, x: jax.Array, *, norm: Norm | None = None, scale: Scale | None = None) -> jax.Array:
        """Returns the map of x.

        Args:
          x: [..., I], the inputs joined to one dimension.
          norm: a norm whose `normalise` made x; its scale and bias are applied here.
          scale: a LayerScale to apply to the result.
        """
        y = self._multiply((x,), *self._gathered(x, norm, scale))
        return y if self.lora is None else y + self.lora(x, norm=norm, scale=scale)

    def of(self, function: Callable[..., jax.Array], *inputs: jax.Array, scale: Scale | None = None) -> jax.Array:
        """Returns the map of `function(*inputs)`, [..., I], of which the backward pass keeps the inputs.

        `function` is cheap to run again: element-wise, or a change of shape.
        """
        y = self._multiply(inputs, *self._gathered(inputs[0], None, scale), function)
        return y if self.lora is None else y + self.lora.of(function, *inputs, scale=scale)

    def each(self, x: jax.Array, *, norm: Norm | None = None) -> list[jax.Array]:
        """Returns the `count` maps of x, [..., *outputs] each, by a product each.

        One product for all would leave its result to be cut into copies, and the gradients to be joined.
        """
        kernel, bias = self._gathered(x, norm, None)
        assert self.input_count == 1

        def cut(array: jax.Array, dimension: int, number: int) -> jax.Array:
            return layout.joined(jax.lax.index_in_dim(array, number, dimension, keepdims=False), dimension)

        numbers = range(kernel.shape[1])
        biases = tuple(None if bias is None else cut(bias, 0, number) for number in numbers)
        kernels = tuple(cut(kernel, 1, number) for number in numbers)
        maps = [self._shaped(y) for y in products((x,), kernels, biases)]
        return maps if self.lora is None else [y + z for y, z in zip(maps, self.lora.each(x, norm=norm), strict=True)]

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of inputs and outputs of one map."""
        return math.prod(self.inputs), math.prod(self.outputs)

    def _gathered(self, x: jax.Array, norm: Norm | None, scale: Scale | None) -> tuple[jax.Array, jax.Array | None]:
        """Returns kernel and bias for a product with x: the kernel in the dtype of x, the bias in float32."""
        kernel, bias, split = self.kernel[...], None if self.bias is None else self.bias[...], layout.spec_of(x)
        shift = None
        if norm is not None:
            kernel, shift = norm.fold(kernel)
        if scale is not None:
            kernel, bias = scale.fold(kernel, bias)
        kernel = layout.gathered(kernel.astype(x.dtype), split)
        biases = [layout.gathered(array, split) for array in (bias, shift) if array is not None]
        return kernel, sum(biases[1:], biases[0]) if biases else None

    def _multiply(
        self,
        inputs: tuple[jax.Array, ...],
        kernel: jax.Array,
        bias: jax.Array | None,
        function: Callable[..., jax.Array] | None = None,
    ) -> jax.Array:
        """Returns the product as [..., *outputs]; the kernel is multiplied as a matrix."""
        kernel = layout.joined(layout.joined(kernel, self.input_count), 0, self.input_count)
        bias = None if bias is None else layout.joined(bias, 0)
        return self._shaped(product(inputs, kernel, bias, function))

    def _shaped(self, y: jax.Array) -> jax.Array:
        """Returns the result of a product, [..., outputs], as [..., *outputs]."""
        if len(self.outputs) == 1:
            return y
        split = layout.spec_of(y, y.ndim - 1, *self.output_names)
        return jax.lax.reshape(y, (*y.shape[:-1], *self.outputs), out_sharding=split)


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

    def __call__(
        self, x: jax.Array, key: jax.Array | None, norm: Norm | None = None, scale: Scale | None = None
    ) -> jax.Array:
        """Maps x; `norm` and `scale` are as for a dense layer."""
        keys = split_key(key, 2)
        layers = (self.up,) if self.gate is None else (self.gate, self.up)
        hidden = [checkpoint_name(layer(x, norm=norm), "mlp") for layer in layers]
        activate = ACTIVATIONS[self.activation]
        keep = dropout_mask(hidden[0], self.dropout, keys[0])
        if keep is None:
            y = self.down.of(activate, *hidden, scale=scale)
        else:
            y = self.down.of(_activate_and_drop(activate, self.dropout), *hidden, keep, scale=scale)
        return dropout(y, self.dropout, keys[1])


def _activate_and_drop(activate: Callable[..., jax.Array], rate: float) -> Callable[..., jax.Array]:
    return lambda *inputs: _drop(activate(*inputs[:-1]), inputs[-1], rate)


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """Splits a key into `count` keys; None gives as many Nones."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes elements of x [B, N, ...] with probability `rate` and scales the rest up (Srivastava et al. 2014).

    The mask is one draw over the global array, of which every device makes its own shard, so that it is the same on
    every mesh. The token axis comes first in the draw: an element's random number then depends only on its position in
    row-major order, and padding tokens at the end, which some meshes need, do not change the mask of those before.
    """
    keep = dropout_mask(x, rate, key)
    return x if keep is None else _drop(x, keep, rate)


def dropout_mask(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array | None:
    """Returns the mask of `dropout` for x, False for elements to drop; None if it drops none."""
    if not rate or key is None:
        return None
    split = layout.spec_of(x)
    if split is not None:
        split = PartitionSpec(split[1], split[0], *split[2:])
    shape = (x.shape[1], x.shape[0], *x.shape[2:])
    return random_mask(key, 1 - rate, shape, split).swapaxes(0, 1)


def random_mask(key: jax.Array, share: float, shape: tuple[int, ...], split: PartitionSpec | None) -> jax.Array:
    """Draws a bool array of this shape and layout that is True with probability `share`, rounded to 16 bits.

    Two neighbours along the first dimension share a random number of 32 bits, the same two on every mesh: random
    numbers are most of what dropout costs, and this takes half the time of a float32 for each element.
    """
    drawn = split
    if split is not None and shape[0] % (2 * layout.shard_count_of(split, 0)):
        drawn = PartitionSpec(None, *split.partitions[1:])  # some two neighbours are on different devices
    bits = jax.random.bits(key, (-(-shape[0] // 2), *shape[1:]), jnp.uint32, out_sharding=drawn)
    halves = jnp.stack([bits & 0xFFFF, bits >> 16], axis=1) < round(share * 2**16)
    mask = jax.lax.reshape(halves, (2 * bits.shape[0], *shape[1:]), out_sharding=drawn)[: shape[0]]
    return mask if drawn == split else jax.sharding.reshard(mask, split)


def _drop(x: jax.Array, keep: jax.Array, rate: float) -> jax.Array:
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

"""The product of activations and a kernel with its own derivative: what is kept, and how gradients are summed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vit_dist.mesh import layout
from vit_dist.model.recompute import run_again


def product(
    inputs: tuple[jax.Array, ...],
    kernel: jax.Array,
    bias: jax.Array | None,
    function: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Multiplies x [..., I] by a kernel [I, O] and adds a bias [O]: [..., O], in the dtype of x.

    The backward pass keeps the inputs and the kernel. It differs from JAX's own in three ways:

    - It runs `function` again instead of keeping x.
    - The bias's gradient is summed in float32.
    - In the product for the kernel's gradient the narrower operand comes first: XLA transposes the first operand on
      CPUs, and in JAX that is always the gradient of the result.

    Args:
      inputs: x, or the arguments of `function`.
      kernel: a gathered kernel in the dtype of x.
      bias: a gathered bias in float32, or None.
      function: an element-wise function that computes x; None: the inputs are x. It must not close over traced values.
    """
    return _product(inputs, kernel, bias, function or _only)


def _only(x: jax.Array) -> jax.Array:
    return x


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(
    inputs: tuple[jax.Array, ...],
    kernel: jax.Array,
    bias: jax.Array | None,
    function: Callable[..., jax.Array],
) -> jax.Array:
    x = function(*inputs)
    split = layout.product_spec(x, kernel)
    y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), out_sharding=split)
    return y if bias is None else y + layout.broadcast(bias.astype(y.dtype), y.shape, split)


def _forward(
    inputs: tuple[jax.Array, ...],
    kernel: jax.Array,
    bias: jax.Array | None,
    function: Callable[..., jax.Array],
) -> tuple[jax.Array, tuple]:
    return _product(inputs, kernel, bias, function), (inputs, kernel, bias)


def _backward(function: Callable[..., jax.Array], saved: tuple, g: jax.Array) -> Any:
    inputs, kernel, bias = saved
    x, pullback = (inputs[0], lambda g: (g,)) if function is _only else run_again(function, inputs)
    x_gradient = jax.lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ())), out_sharding=layout.spec_of(x))
    bias_gradient = None
    if bias is not None:
        rows = tuple(range(g.ndim - 1))
        bias_gradient = jax.lax.reduce_sum(g.astype(jnp.float32), rows, out_sharding=layout.gradient_spec(bias, (0,)))
    return pullback(x_gradient), _kernel_gradient(x, kernel, g), bias_gradient


_product.defvjp(_forward, _backward)


def _kernel_gradient(x: jax.Array, kernel: jax.Array, g: jax.Array) -> jax.Array:
    rows = tuple(range(x.ndim - 1))
    contract = ((rows, rows), ((), ()))
    if x.shape[-1] <= g.shape[-1]:
        return jax.lax.dot_general(x, g, contract, out_sharding=layout.gradient_spec(kernel, (0, 1)))
    transposed = jax.lax.dot_general(g, x, contract, out_sharding=layout.gradient_spec(kernel, (1, 0)))
    # Without the barrier XLA fuses the transpose into the product, which then misses the fast CPU routine.
    return jax.lax.optimization_barrier(transposed).T

"""The product of activations and a kernel with its own derivative: what is kept, and how gradients are summed."""

import functools
from collections.abc import Callable
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
    return products(inputs, (kernel,), (bias,), function)[0]


def products(
    inputs: tuple[jax.Array, ...],
    kernels: tuple[jax.Array, ...],
    biases: tuple[jax.Array | None, ...],
    function: Callable[..., jax.Array] | None = None,
) -> tuple[jax.Array, ...]:
    """Returns the products of one x with several kernels of the same shape; see `product`.

    The gradients of x are added on each device first, and then summed over `tensor`, once.
    """
    return _products(inputs, kernels, biases, function or _only)


def _only(x: jax.Array) -> jax.Array:
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _products(
    inputs: tuple[jax.Array, ...],
    kernels: tuple[jax.Array, ...],
    biases: tuple[jax.Array | None, ...],
    function: Callable[..., jax.Array],
) -> tuple[jax.Array, ...]:
    x = function(*inputs)

    def one(kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        split = layout.product_spec(x, kernel)
        y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), out_sharding=split)
        return y if bias is None else y + layout.broadcast(bias.astype(y.dtype), y.shape, split)

    return tuple(map(one, kernels, biases))


def _forward(
    inputs: tuple[jax.Array, ...],
    kernels: tuple[jax.Array, ...],
    biases: tuple[jax.Array | None, ...],
    function: Callable[..., jax.Array],
) -> tuple[tuple[jax.Array, ...], tuple]:
    return _products(inputs, kernels, biases, function), (inputs, kernels, biases)


def _backward(function: Callable[..., jax.Array], saved: tuple, gradients: tuple[jax.Array, ...]) -> Any:
    inputs, kernels, biases = saved
    x, pullback = (inputs[0], lambda g: (g,)) if function is _only else run_again(function, inputs)
    split = layout.partial_sum_spec(x, kernels[0])
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    parts = (
        jax.lax.dot_general(g, kernel, contract, out_sharding=split)
        for g, kernel in zip(gradients, kernels, strict=True)
    )
    x_gradient = layout.summed(functools.reduce(jnp.add, parts), x)
    kernel_gradients = (_kernel_gradient(x, kernel, g) for kernel, g in zip(kernels, gradients, strict=True))
    bias_gradients = (_bias_gradient(bias, g) for bias, g in zip(biases, gradients, strict=True))
    return pullback(x_gradient), tuple(kernel_gradients), tuple(bias_gradients)


_products.defvjp(_forward, _backward)


def _bias_gradient(bias: jax.Array | None, g: jax.Array) -> jax.Array | None:
    if bias is None:
        return None
    rows = tuple(range(g.ndim - 1))
    return jax.lax.reduce_sum(g.astype(jnp.float32), rows, out_sharding=layout.gradient_spec(bias, (0,)))


def _kernel_gradient(x: jax.Array, kernel: jax.Array, g: jax.Array) -> jax.Array:
    rows = tuple(range(x.ndim - 1))
    contract = ((rows, rows), ((), ()))
    if x.shape[-1] <= g.shape[-1]:
        return jax.lax.dot_general(x, g, contract, out_sharding=layout.gradient_spec(kernel, (0, 1)))
    transposed = jax.lax.dot_general(g, x, contract, out_sharding=layout.gradient_spec(kernel, (1, 0)))
    # Without the barrier XLA fuses the transpose into the product, which then misses the fast CPU routine.
    return jax.lax.optimization_barrier(transposed).T

"""Differentiates element-wise functions from their inputs alone.

JAX saves every intermediate result that a derivative needs, in float32 where the function computes in float32. In a
loop over blocks no compiler can drop one of them, and in unrolled blocks it often does not. For a chain of element-wise
operations it is cheaper to save the inputs, which other operations need anyway, and to run the function again in the
backward pass, where the compiler fuses it with the derivative. A new layer gets this by `recompute`.
"""

from collections.abc import Callable
from typing import Any

import jax


def recompute(function: Callable[..., jax.Array], *inputs: jax.Array) -> jax.Array:
    """Returns `function(*inputs)`, of which the backward pass keeps the inputs only.

    Second derivatives are JAX's own of the derivative; forward-mode differentiation raises JAX's TypeError, which names
    `custom_vjp`.

    Args:
      function: a differentiable function of arrays, cheap to run again. It must not close over traced values.
      *inputs: its arguments.
    """

    @jax.custom_vjp
    def run(*inputs: jax.Array) -> jax.Array:
        return function(*inputs)

    def forward(*inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        return function(*inputs), inputs

    def backward(inputs: tuple[jax.Array, ...], g: jax.Array) -> Any:
        return run_again(function, inputs)[1](g)

    run.defvjp(forward, backward)
    return run(*inputs)


def run_again(function: Callable[..., jax.Array], inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, Callable]:
    """Returns `function(*inputs)` and its pullback, in a backward pass.

    The barrier hides from the compiler that the forward pass has run the function on the same inputs; it would
    otherwise keep intermediate results from there.
    """
    return jax.vjp(function, *jax.lax.optimization_barrier(inputs))

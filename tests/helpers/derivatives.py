"""Checks a function that has a derivative of its own against JAX's derivative of the same function, written plainly.

The plain function computes in the dtype of its inputs or in `wide` of it, never in float32 by name: given float64 it
tells how far both are from the truth.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

Function = Callable[..., Any]
FLOAT32_ERROR = 1e-6


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def wide(x: jax.Array) -> jax.Array:
    """Returns x in float32; in float64 if it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_float32(ours: Function, plain: Function, arguments: tuple) -> None:
    """Values and gradients are JAX's own up to 1e-6, and the gradients are those of numerical differentiation."""
    g = cotangents(plain, arguments)
    for one, other in zip(pulled_back(ours, arguments, g), pulled_back(plain, arguments, g), strict=True):
        assert distance(one, other) <= FLOAT32_ERROR * np.linalg.norm(other)
    check_grads(ours, arguments, order=1, modes=["rev"], rtol=1e-2, eps=1e-2)


def check_bfloat16(ours: Function, plain: Function, arguments: tuple, kept: int = 0, slack: float = 1.02) -> None:
    """Values and gradients are no further from float64 than JAX's own, and of the same dtypes.

    Args:
      ours: a function with a derivative of its own.
      plain: the same, written plainly.
      arguments: float32 arrays, which are rounded to bfloat16 first.
      kept: how many of them, from the last on, are not, because they are float32 in a model in bfloat16.
      slack: by how much the error may be larger, where sums in another order round otherwise.
    """
    rounded = [jnp.asarray(one, jnp.bfloat16) for one in arguments[: len(arguments) - kept]]
    rounded += [jnp.asarray(one) for one in arguments[len(rounded) :]]
    g = cotangents(plain, rounded)
    found, own = pulled_back(ours, rounded, g), pulled_back(plain, rounded, g)
    with jax.enable_x64(True):
        in_float64 = [[jnp.asarray(one, jnp.float64) for one in arrays] for arrays in (rounded, g)]
        exact = pulled_back(plain, *in_float64)
    for one, other, true in zip(found, own, exact, strict=True):
        assert one.dtype == other.dtype
        assert distance(one, true) <= slack * distance(other, true) + FLOAT32_ERROR * np.linalg.norm(true)


def check_second(ours: Function, plain: Function, arguments: tuple) -> None:
    """The product of the Hessian of a curved score with a vector is JAX's own, in float32."""
    vectors = tuple(random(*one.shape, seed=30 + i) for i, one in enumerate(arguments))
    weights = cotangents(plain, arguments)

    def product(function: Function) -> Any:
        def score(*arguments: Any) -> jax.Array:
            return sum(jnp.vdot(jnp.sin(y), g) for y, g in zip(jax.tree.leaves(function(*arguments)), weights))

        gradients = jax.grad(score, tuple(range(len(arguments))))
        return jax.jit(lambda *arguments: jax.vjp(gradients, *arguments)[1](vectors))(*arguments)

    for one, other in zip(product(ours), product(plain), strict=True):
        assert distance(one, other) <= 3 * FLOAT32_ERROR * np.linalg.norm(other) > 0


def cotangents(function: Function, arguments: Any) -> list[jax.Array]:
    """Returns random numbers of the shapes and dtypes of the function's results."""
    results = jax.tree.leaves(jax.eval_shape(function, *arguments))
    return [jnp.asarray(random(*one.shape, seed=10 + i), one.dtype) for i, one in enumerate(results)]


def pulled_back(function: Function, arguments: Any, g: list[jax.Array]) -> list[Any]:
    """Returns the function's values, and their gradients for g by every argument."""

    def run(*arguments: Any) -> Any:
        y, pullback = jax.vjp(function, *arguments)
        return y, pullback(jax.tree.unflatten(jax.tree.structure(y), g))

    return jax.tree.leaves(jax.jit(run)(*arguments))


def distance(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - np.asarray(expected, np.float64)))

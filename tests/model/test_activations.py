"""The activations and their derivatives, against float64 and against JAX's own."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_dist.model.activations import ACTIVATIONS

X = np.linspace(-6, 6, 1201)


def exact_gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value and derivative in float64."""
    share = 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x * share, share + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def exact_gelu_tanh(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    inner, slope = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3), math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    tanh = np.tanh(inner)
    return x * (1 + tanh) / 2, (1 + tanh) / 2 + x * (1 - tanh**2) * slope / 2


def exact_quick_gelu(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    share = 1 / (1 + np.exp(-1.702 * x))
    return x * share, share + 1.702 * x * share * (1 - share)


EXACT = {"gelu": exact_gelu, "gelu_tanh": exact_gelu_tanh, "quick_gelu": exact_quick_gelu}
JAXS: dict[str, Callable[[Any], Any]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False), "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}  # fmt: skip


def value_and_slope(function: Callable[[Any], Any], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    x = jnp.asarray(X, dtype)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(function(x).astype(jnp.float32))))(x)
    return np.asarray(jax.jit(function)(x), np.float64), np.asarray(slope, np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", EXACT)
def test_an_activations_derivative_is_that_of_float64(name: str, dtype: Any) -> None:
    exact = EXACT[name](np.asarray(jnp.asarray(X, dtype), np.float64))
    ours, jaxs = value_and_slope(ACTIVATIONS[name], dtype), value_and_slope(JAXS[name], dtype)
    for own, other, true in zip(ours, jaxs, exact, strict=True):
        assert np.abs(own - true).max() <= max(1.001 * np.abs(other - true).max(), 1e-6)


def test_swiglu_gates_one_half_by_the_other() -> None:
    gate, up = X[:600], X[600:1200]
    ours = ACTIVATIONS["swiglu"](jnp.asarray(gate, jnp.float32), jnp.asarray(up, jnp.float32))
    np.testing.assert_allclose(ours, gate / (1 + np.exp(-gate)) * up, rtol=1e-5, atol=1e-6)

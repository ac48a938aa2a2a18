"""The product's own derivative, against JAX's and against float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from vit_dist.model.activations import gelu
from vit_dist.model.product import product


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return gelu(x) @ kernel + bias.astype(x.dtype)


def ours(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return product((x,), kernel, bias, gelu)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 24), (24, 8)])
def test_values_and_gradients_are_jaxs_own(inputs: int, outputs: int) -> None:
    arguments = random(2, 5, inputs), random(inputs, outputs, seed=1), random(outputs, seed=2)
    weights = random(2, 5, outputs, seed=3)
    values = [
        jax.value_and_grad(lambda *arguments, f=f: jnp.sum(f(*arguments) * weights), argnums=(0, 1, 2))(*arguments)
        for f in (ours, plain)
    ]
    for one, other in zip(*map(jax.tree.leaves, values), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6 * np.abs(other).max())
    check_grads(ours, arguments, order=1, modes=["rev"], rtol=1e-2)


def test_a_bias_gradient_in_bfloat16_is_summed_in_float32() -> None:
    x, kernel = jnp.asarray(random(4, 1024, 8), jnp.bfloat16), jnp.asarray(random(8, 8, seed=1), jnp.bfloat16)
    weights = 1 + random(4, 1024, 8, seed=2) / 8
    gradient = jax.grad(lambda bias: jnp.sum(product((x,), kernel, bias).astype(jnp.float32) * weights))(jnp.zeros(8))
    exact = np.asarray(jnp.asarray(weights, jnp.bfloat16), np.float64).sum((0, 1))
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(gradient, exact, rtol=1e-6)  # bfloat16 holds 8 bits: 4e-3


def test_without_a_bias_there_is_no_gradient_for_one() -> None:
    x, kernel = random(3, 4), random(4, 2)
    gradients = jax.grad(lambda x, kernel: jnp.sum(product((x,), kernel, None)), argnums=(0, 1))(x, kernel)
    np.testing.assert_allclose(gradients[1], np.broadcast_to(x.sum(0)[:, None], (4, 2)), rtol=1e-6)

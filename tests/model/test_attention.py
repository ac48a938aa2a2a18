"""Attention by XLA: dropped weights, and its errors in bfloat16."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives import check_bfloat16, check_float32, check_second, cotangents, distance, pulled_back, random

from vit_dist.model.attention import _scores, attend


def test_dropped_attention_weights_are_zero_at_the_rate_and_the_rest_scaled_up() -> None:
    q, k, v = jnp.zeros((32, 40, 2, 40)), jnp.zeros((32, 40, 2, 40)), jnp.zeros((32, 40, 2, 40))
    v = v + jnp.eye(40)[None, :, None, :]  # so that the output is the weights themselves, each 1/40 without dropout
    weights = np.asarray(attend(q, k, v, "xla", 0.25, jax.random.key(0)))
    assert (weights == 0).mean() == pytest.approx(0.25, abs=0.01)
    np.testing.assert_allclose(weights[weights > 0], 1 / 40 / 0.75, rtol=1e-5)
    assert (weights[0] != weights[1]).any() and (weights[:, :, 0] != weights[:, :, 1]).any()
    np.testing.assert_allclose(attend(q, k, v, "xla", 0.25, None), 1 / 40, rtol=1e-5)


def test_scores_in_bfloat16_are_not_rounded_before_the_softmax() -> None:
    # Scores of 20 + i/64: bfloat16 rounds neighbouring scores to the same number, and their weights would be equal.
    size, keys = 64, 8
    q = jnp.zeros((1, 1, 1, size), jnp.bfloat16).at[..., :2].set(1).at[..., 2:].set(0) * size**0.5
    k = jnp.zeros((1, keys, 1, size), jnp.bfloat16).at[..., 0].set(20)
    k = k.at[0, :, 0, 1].set((jnp.arange(keys) / 64).astype(jnp.bfloat16))
    v = jnp.eye(keys, size, dtype=jnp.bfloat16)[None, :, None]
    weights = np.asarray(attend(q, k, v, "xla"), np.float64)[0, 0, 0, :keys]
    expected = np.exp(np.arange(keys) / 64)
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=4e-3)  # half a unit of bfloat16
    assert weights[-1] / weights[0] > 1.08


def test_attention_in_bfloat16_keeps_the_error_of_its_gradients_below_two_percent() -> None:
    arrays = [random(4, 24, 2, 16, seed=seed) for seed in range(4)]

    def gradients(dtype: Any) -> Any:
        q, k, v, g = (jnp.asarray(array, dtype) for array in arrays)
        return jax.grad(lambda q, k, v: jnp.sum(attend(3 * q, k, v, "xla") * g), argnums=(0, 1, 2))(q, k, v)

    for gradient, expected in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert gradient.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(gradient, np.float32) - expected) / np.linalg.norm(expected)
        assert error < 0.02


def plain_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("bqhd,bkhd->bhqk", q, k)


@pytest.mark.parametrize("queries", [24, 5], ids=["self-attention", "fewer queries than keys"])
def test_the_gradients_of_scores_are_those_of_a_plain_product(queries: int) -> None:
    arguments = random(2, queries, 3, 16), random(2, 24, 3, 16, seed=1)
    check_float32(_scores, plain_scores, arguments)
    check_second(_scores, plain_scores, arguments)
    # In bfloat16 the scores are float32. Rounded, they are the plain product's, and so are the gradients.
    check_bfloat16(lambda q, k: _scores(q, k).astype(q.dtype), plain_scores, arguments)


def test_rounding_the_gradient_of_scores_adds_no_more_than_half_to_the_error() -> None:
    """JAX's own multiplies that gradient in float32 by bfloat16, so that it rounds once, and ours twice."""

    def plain(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)

    q, k = (jnp.asarray(random(4, 24, 2, 16, seed=seed), jnp.bfloat16) for seed in (0, 1))
    g = cotangents(plain, (q, k))
    exact = pulled_back(plain, [one.astype(jnp.float32) for one in (q, k)], g)[1:]
    found, own = (pulled_back(function, (q, k), g)[1:] for function in (_scores, plain))
    for one, other, true in zip(found, own, exact, strict=True):
        assert one.dtype == jnp.bfloat16
        assert distance(one, true) < 1.5 * distance(other, true)

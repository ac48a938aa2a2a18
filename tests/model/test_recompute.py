"""What is kept for the backward pass of element-wise functions, and that their derivatives are JAX's own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from products import equations

from vit_dist.model.layers import _layer_norm
from vit_dist.model.recompute import recompute


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def wave(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sin(x) * jnp.exp(y)


def test_the_inputs_are_all_that_is_kept() -> None:
    inputs = random(3, 4), random(3, 4, seed=1)
    _, pullback = jax.vjp(lambda *inputs: recompute(wave, *inputs), *inputs)
    kept = [leaf for leaf in jax.tree.leaves(pullback) if np.shape(leaf) == (3, 4)]
    assert len(kept) == 2
    assert all(any(np.array_equal(leaf, own) for own in inputs) for leaf in kept)
    _, plain = jax.vjp(wave, *inputs)
    assert not any(np.array_equal(leaf, inputs[0]) for leaf in jax.tree.leaves(plain))  # but sines, cosines and powers


def test_the_backward_pass_runs_the_function_again_behind_a_barrier() -> None:
    gradient = jax.grad(lambda x, y: jnp.sum(recompute(wave, x, y)))
    names = [each.primitive.name for each, _ in equations(jax.make_jaxpr(gradient)(random(3), random(3)).jaxpr)]
    assert names.count("optimization_barrier") == 1
    assert names.index("optimization_barrier") < names.index("cos")


def test_the_derivative_is_jaxs_own_and_has_a_derivative() -> None:
    inputs = random(3, 4), random(3, 4, seed=1)
    ours = jax.grad(lambda *inputs: jnp.sum(recompute(wave, *inputs)), argnums=(0, 1))(*inputs)
    own = jax.grad(lambda *inputs: jnp.sum(wave(*inputs)), argnums=(0, 1))(*inputs)
    for one, other in zip(ours, own, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    check_grads(lambda *inputs: recompute(wave, *inputs), inputs, order=2, modes=["rev"], rtol=1e-2)


def test_a_mask_is_an_input_without_a_gradient() -> None:
    keep = np.array([True, False, True])
    gradient = jax.grad(lambda x: jnp.sum(recompute(lambda keep, x: jnp.where(keep, x * x, 0), keep, x)))(random(3))
    np.testing.assert_allclose(gradient, 2 * random(3) * keep, rtol=1e-6)


def test_forward_mode_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: recompute(jnp.sin, x), (1.0,), (1.0,))


def norm_gradients(norm: Any, dtype: Any) -> tuple:
    """Gradients of x, scale and bias of a LayerNorm of rows [6, 64], in float64."""
    x, scale, bias = 3 + random(6, 64), 1 + 0.3 * random(64, seed=1), random(64, seed=2)
    weights = random(6, 64, seed=3)

    def score(x: jax.Array, *affine: jax.Array) -> jax.Array:
        return jnp.sum(norm(x, *affine).astype(jnp.float32) * weights)

    gradients = jax.jit(jax.grad(score, argnums=(0, 1, 2)))(jnp.asarray(x, dtype), scale, bias)
    return tuple(np.asarray(gradient, np.float64) for gradient in gradients)


def exact_norm_gradients(dtype: Any) -> tuple:
    """The same by the formula, in float64, of inputs rounded to `dtype`."""
    x = np.asarray(jnp.asarray(3 + random(6, 64), dtype), np.float64)
    scale, g = np.float64(1 + 0.3 * random(64, seed=1)), np.float64(random(6, 64, seed=3))
    if dtype == jnp.bfloat16:  # of a result in bfloat16 the gradient is rounded too
        g = np.asarray(jnp.asarray(g, dtype), np.float64)
    deviation = np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    normal = (x - x.mean(-1, keepdims=True)) / deviation
    inner = g * scale
    slope = inner - inner.mean(-1, keepdims=True) - normal * (inner * normal).mean(-1, keepdims=True)
    return slope / deviation, (g * normal).sum(0), g.sum(0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradients_of_layer_norm_are_jaxs_own_and_no_further_from_float64(dtype: Any) -> None:
    norm = functools.partial(_layer_norm, 1e-6)
    ours, own = norm_gradients(lambda *inputs: recompute(norm, *inputs), dtype), norm_gradients(norm, dtype)
    for one, other, exact in zip(ours, own, exact_norm_gradients(dtype), strict=True):
        largest = np.abs(exact).max()
        if dtype == jnp.float32:
            np.testing.assert_allclose(one, other, atol=1e-6 * largest, rtol=0)
        assert np.abs(one - exact).max() <= 1.001 * np.abs(other - exact).max() + 1e-6 * largest

"""What is kept for the backward pass of element-wise functions, and that their derivatives are JAX's own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives import check_bfloat16, check_float32, check_second, random, wide
from jax.test_util import check_grads
from products import equations

from vit_dist.model.norm import _normalised
from vit_dist.model.recompute import recompute


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
    check_bfloat16(lambda *inputs: recompute(wave, *inputs), wave, inputs)
    check_second(lambda *inputs: recompute(wave, *inputs), wave, inputs)


def test_a_mask_is_an_input_without_a_gradient() -> None:
    keep = np.array([True, False, True])
    gradient = jax.grad(lambda x: jnp.sum(recompute(lambda keep, x: jnp.where(keep, x * x, 0), keep, x)))(random(3))
    np.testing.assert_allclose(gradient, 2 * random(3) * keep, rtol=1e-6)


def test_forward_mode_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: recompute(jnp.sin, x), (1.0,), (1.0,))


def norm(kind: str) -> Any:
    return lambda x, *affine: recompute(functools.partial(_normalised, kind, 1e-6), x, *affine)


def plain_norm(kind: str) -> Any:
    def plain(x: jax.Array, *affine: jax.Array) -> jax.Array:
        centred = wide(x) - jnp.mean(wide(x), -1, keepdims=True) if kind == "layernorm" else wide(x)
        y = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + 1e-6)
        for operation, one in zip((jnp.multiply, jnp.add), affine, strict=False):
            y = operation(y, one)
        return y.astype(x.dtype)

    return plain


NORM_INPUTS = 3 + random(6, 64), 1 + 0.3 * random(64, seed=1), random(64, seed=2)


@pytest.mark.parametrize(("kind", "count"), [("layernorm", 1), ("layernorm", 3), ("rmsnorm", 1), ("rmsnorm", 2)])
def test_the_gradients_of_a_norm_are_those_of_a_plain_one(kind: str, count: int) -> None:
    check_float32(norm(kind), plain_norm(kind), NORM_INPUTS[:count])
    check_bfloat16(norm(kind), plain_norm(kind), NORM_INPUTS[:count], kept=count - 1)


@pytest.mark.parametrize(("kind", "count"), [("layernorm", 3), ("rmsnorm", 2)])
def test_the_second_derivative_of_a_norm_is_that_of_a_plain_one(kind: str, count: int) -> None:
    check_second(norm(kind), plain_norm(kind), NORM_INPUTS[:count])

"""The TPU kernel of attention, run as plain JAX, against attention in float64 that is written out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_dist.model import tpu_attention
from vit_dist.model.attention import attend

Arrays = tuple[Any, ...]


def exact(q: Any, k: Any, v: Any, g: Any, tokens: int) -> Arrays:
    """Returns attention [B, N, H, d] and its gradients by q, k and v for the gradient `g`, in float64."""
    q, k, v, g = (np.asarray(t, np.float64) for t in (q, k, v, g))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights[..., tokens:] = 0
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("bqhd,bkhd->bhqk", g, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    return (
        np.einsum("bhqk,bkhd->bqhd", weights, v),
        np.einsum("bhqk,bkhd->bqhd", d_scores, k),
        np.einsum("bhqk,bqhd->bkhd", d_scores, q),
        np.einsum("bhqk,bqhd->bkhd", weights, g),
    )


def kernel(tokens: int) -> Callable:
    return lambda q, k, v: tpu_attention.attend_locally(q, k, v, tokens, interpret=True)


def with_gradients(function: Callable, q: Any, k: Any, v: Any, g: Any) -> Arrays:
    y, gradients = jax.vjp(function, q, k, v)
    return (y, *gradients(g))


def inputs(shape: tuple[int, ...], dtype: str = "float32") -> Arrays:
    """Returns q, k, v and g; the queries are large enough for weights from 0 to almost 1."""
    draws = (np.random.default_rng(seed).normal(size=shape) for seed in range(4))
    return tuple(jnp.asarray(draw * scale, dtype) for draw, scale in zip(draws, (3, 1, 1, 1), strict=True))


def error(found: Any, expected: Any) -> float:
    return float(np.linalg.norm(np.asarray(found, np.float64) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        pytest.param((2, 20, 2, 64), 20, id="two heads fill 128 lanes"),
        pytest.param((2, 20, 16, 80), 20, id="eight heads fill 640 lanes"),
        pytest.param((1, 13, 3, 16), 13, id="the heads do not fill their lanes"),
        pytest.param((2, 21, 4, 64), 17, id="padding"),
    ],
)
def test_the_kernel_and_its_gradients_are_attention_in_float32(shape: tuple[int, ...], tokens: int) -> None:
    arguments = inputs(shape)
    for found, expected in zip(with_gradients(kernel(tokens), *arguments), exact(*arguments, tokens), strict=True):
        assert error(found, expected) < 1e-6


def test_the_kernel_is_the_same_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpu_attention, "SCORES", 16 * 40)  # 3 blocks of 16 queries, the last of them with 8
    arguments = inputs((2, 40, 4, 64))
    assert tpu_attention._specs((2, 40, 256), 64)[0] == (2, 1, 3)
    for found, expected in zip(with_gradients(kernel(35), *arguments), exact(*arguments, 35), strict=True):
        assert error(found, expected) < 1e-6


def test_padding_gets_no_weight_and_no_gradient() -> None:
    q, k, v, g = inputs((2, 21, 2, 64))
    g = g.at[:, 17:].set(0)  # nothing after the attention reads the rows of padding
    filled = [t.at[:, 17:].set(1e4) for t in (q, k, v)]
    plain, padded = with_gradients(kernel(17), q, k, v, g), with_gradients(kernel(17), *filled, g)
    for found, expected in zip(padded, plain, strict=True):
        np.testing.assert_array_equal(found[:, :17], expected[:, :17])
    for gradient in padded[1:]:
        np.testing.assert_array_equal(gradient[:, 17:], 0)


def test_bfloat16_is_as_close_to_float64_as_attention_by_xla() -> None:
    arguments = inputs((2, 40, 4, 64), "bfloat16")
    expected = exact(*arguments, 40)
    by_kernel = with_gradients(kernel(40), *arguments)
    by_xla = with_gradients(lambda q, k, v: attend(q, k, v, "xla"), *arguments)
    for mine, theirs, truth in zip(by_kernel, by_xla, expected, strict=True):
        assert mine.dtype == jnp.bfloat16
        assert error(mine, truth) < 1.02 * error(theirs, truth) < 0.01


def test_a_second_derivative_is_refused_with_what_to_set() -> None:
    q, k, v, g = inputs((1, 8, 2, 64))
    gradient = jax.grad(lambda q: jnp.vdot(kernel(8)(q, k, v), g))
    for second in (jax.grad(lambda q: jnp.vdot(gradient(q), g)), jax.jit(lambda q: jax.vjp(gradient, q)[1](g))):
        with pytest.raises(NotImplementedError, match="no second derivative; set model.attention=xla"):
            second(q)


def test_a_block_holds_complete_heads_and_fits_on_the_chip() -> None:
    for width, head in [(192, 64), (384, 64), (768, 64), (1024, 64), (1152, 72), (1280, 80), (1408, 88), (1664, 104)]:
        for length in (196, 197, 257, 577, 1025, 4096):
            rows, lanes = tpu_attention._block((2, length, width), head)
            examples, groups, blocks = tpu_attention._specs((2, length, width), head)[0]
            assert lanes % head == 0 and (lanes % 128 == 0 or lanes == width)
            assert rows == length or rows % 16 == 0
            assert (rows - 1) * length < 2 * tpu_attention.SCORES
            assert examples == 2 and groups * lanes == width and 0 <= blocks * rows - length < rows


@pytest.mark.parametrize(
    ("length", "heads", "head", "expected"),
    [(196, 6, 64, True), (4096, 12, 64, True), (729, 16, 72, True), (1025, 16, 80, True), (4096, 16, 88, False)],
)
def test_heads_that_fill_few_lanes_together_fit_more_tokens(length: int, heads: int, head: int, expected: bool) -> None:
    assert tpu_attention.fits(length, heads, head, "TPU v5 lite") is expected


def test_a_v4_holds_fewer_keys() -> None:
    assert [tpu_attention.fits(length, 12, 64, "TPU v4") for length in (3072, 3073)] == [True, False]

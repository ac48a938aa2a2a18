"""Attention on TPUs as one kernel that keeps an example's scores on the chip, for tokens that the mesh does not split.

XLA writes the scores [B, H, N, N] to memory in float32 and their softmax in bfloat16, saves both for the backward pass,
and pads their last dimension to 128 lanes. This Pallas kernel has a block of queries and all keys of some heads at
hand, so it computes complete rows of scores and needs no running softmax. It saves only queries, keys and values; the
backward kernel computes the scores again. It reads and writes [B, N, H * d] as the dense layers do: nothing is
transposed, and heads of 64 are not padded to 128 lanes.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MASKED = -1e30  # a finite score: a row of -inf would have no softmax
LANES = 128  # of a TPU's vector registers: a block's last dimension is a multiple, or the whole of the array's
# Limits of a block's size, so that the backward pass fits into the on-chip memory of a kernel. That is 16 MiB by
# default. A block with more than `LARGE` elements of keys needs more, which the compiler then cannot use for arrays
# around the kernel; no block may have more than `LARGEST`.
SCORES = 256 * 1024  # scores of a head that are held at a time, at most twice as many in a single block
KEYS = 128 * 1024  # elements of the keys of several heads that are held at a time
LARGE, LARGE_MEMORY = 384 * 1024, 48 * 2**20
LARGEST = 1024 * 1024


def fits(length: int, heads: int, head: int, kind: str) -> bool:
    """Returns whether the kernel holds all keys of its smallest group of heads, for N tokens, H heads of size d.

    `kind` is the `device_kind`: no kernel on a TPU v4 gets more on-chip memory than the default.
    """
    return length * _block((1, length, heads * head), head)[1] <= (LARGE if kind == "TPU v4" else LARGEST)


def attend_locally(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int, *, interpret: bool = False) -> jax.Array:
    """Computes one device's self-attention, softmax(QK^T / sqrt(d)) V.

    Scores and softmax are in float32 for any dtype; the weights are rounded to the dtype of `v` before their product.

    Args:
      q: queries [B, N, H, d].
      k: keys [B, N, H, d].
      v: values [B, N, H, d].
      tokens: how many of the N tokens are real; the rest is padding at the end, which no query attends to.
      interpret: runs the kernel as plain JAX, on any device.

    Returns:
      [B, N, H, d] in the dtype of `v`.
    """
    flat = (t.reshape(*t.shape[:2], -1) for t in (q, k, v))
    return _attend(*flat, q.shape[-1], tokens, interpret).reshape(q.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, head: int, tokens: int, interpret: bool) -> jax.Array:
    grid, queries, keys = _specs(q.shape, head)
    return pl.pallas_call(
        functools.partial(_forward_kernel, head, tokens),
        grid=grid,
        in_specs=[queries, keys, keys],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, v.dtype),
        compiler_params=_compiler_params("parallel", q.shape, head),
        interpret=interpret,
        name="attention_forward",
    )(q, k, v)


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, head: int, tokens: int, interpret: bool
) -> tuple[jax.Array, tuple]:
    return _attend(q, k, v, head, tokens, interpret), (q, k, v)


def _attend_backward(head: int, tokens: int, interpret: bool, saved: tuple, g: jax.Array) -> tuple:
    return _gradients(*saved, g, head, tokens, interpret)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def _gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, head: int, tokens: int, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of q, k and v for g, that of the output."""
    grid, queries, keys = _specs(q.shape, head)
    accumulator = pltpu.VMEM((q.shape[1], _block(q.shape, head)[1]), jnp.float32)
    dq, dk, dv = pl.pallas_call(
        functools.partial(_backward_kernel, head, tokens, q.shape[1]),
        grid=grid,
        in_specs=[queries, keys, keys, queries],
        out_specs=[queries, keys, keys],
        out_shape=[jax.ShapeDtypeStruct(t.shape, t.dtype) for t in (q, k, v)],
        scratch_shapes=[accumulator, accumulator],
        compiler_params=_compiler_params("arbitrary", q.shape, head),
        interpret=interpret,
        name="attention_backward",
    )(q, k, v, g)
    return dq, dk, dv


@_gradients.defjvp
def _refuse_second_derivative(*_: Any) -> Any:
    """Says what JAX, which cannot differentiate the kernel, would say by an AssertionError without a text."""
    raise NotImplementedError("attention on TPUs has no second derivative; set model.attention=xla")


_attend.defvjp(_attend_forward, _attend_backward)


def _specs(shape: tuple[int, ...], head: int) -> tuple[tuple[int, ...], pl.BlockSpec, pl.BlockSpec]:
    """Returns the grid (examples, groups of heads, blocks of queries) and the blocks of queries and of keys."""
    (examples, length, width), (rows, lanes) = shape, _block(shape, head)
    queries = pl.BlockSpec((None, rows, lanes), lambda example, heads, block: (example, block, heads))
    keys = pl.BlockSpec((None, length, lanes), lambda example, heads, block: (example, 0, heads))
    return (examples, width // lanes, pl.cdiv(length, rows)), queries, keys


def _block(shape: tuple[int, ...], head: int) -> tuple[int, int]:
    """Returns how many queries, and lanes of complete heads, a block of [B, N, H * d] has; `head` is d."""
    length, width = shape[1:]
    group = math.lcm(head, LANES)
    if width % group:
        group = width  # no group of complete heads fills its lanes
    fitting = (lanes for lanes in range(group, width + 1, group) if width % lanes == 0 and lanes * length <= KEYS)
    rows = length if length * length <= 2 * SCORES else max(SCORES // length // 16 * 16, 16)
    return rows, max(fitting, default=group)


def _compiler_params(
    queries: Literal["parallel", "arbitrary"], shape: tuple[int, ...], head: int
) -> pltpu.CompilerParams:
    """Returns the compiler's options; `queries`: whether blocks of queries run in any order or one after another."""
    memory = LARGE_MEMORY if shape[1] * _block(shape, head)[1] > LARGE else None
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", queries), vmem_limit_bytes=memory)


def _forward_kernel(head: int, tokens: int, q_ref: Any, k_ref: Any, v_ref: Any, o_ref: Any) -> None:
    q, k, v = q_ref[...], k_ref[...], v_ref[...]
    mixed = []
    for at in _heads(q.shape[1], head):
        weights, total = _softmax(q[:, at], k[:, at], tokens)
        mixed.append(_dot(weights.astype(v.dtype), v[:, at], 1, 0) / total)
    o_ref[...] = jnp.concatenate(mixed, axis=1).astype(o_ref.dtype)


def _backward_kernel(head: int, tokens: int, length: int, *refs: Any) -> None:
    q_ref, k_ref, v_ref, g_ref, dq_ref, dk_ref, dv_ref, dk_sum, dv_sum = refs
    block, blocks = pl.program_id(2), pl.num_programs(2)

    @pl.when(block == 0)
    def _() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    q, k, v, g = q_ref[...], k_ref[...], v_ref[...], g_ref[...]
    if length % q.shape[0]:  # the last block ends after the last query: what lies beyond is undefined
        row = block * q.shape[0] + jax.lax.broadcasted_iota(jnp.int32, q.shape, 0)
        q, g = (jnp.where(row < length, t, jnp.zeros_like(t)) for t in (q, g))
    scale, dq, dk, dv = head**-0.5, [], [], []
    for at in _heads(q.shape[1], head):
        weights, total = _softmax(q[:, at], k[:, at], tokens)
        weights = weights / total
        dv.append(_dot(weights.astype(g.dtype), g[:, at], 0, 0))
        d_weights = _dot(g[:, at], v[:, at], 1, 1)
        mean = jnp.sum(weights * d_weights, axis=1, keepdims=True)
        d_scores = (weights * (d_weights - mean) * scale).astype(q.dtype)
        dq.append(_dot(d_scores, k[:, at], 1, 0))
        dk.append(_dot(d_scores, q[:, at], 0, 0))
    dq_ref[...] = jnp.concatenate(dq, axis=1).astype(dq_ref.dtype)
    dk_sum[...] += jnp.concatenate(dk, axis=1)
    dv_sum[...] += jnp.concatenate(dv, axis=1)

    @pl.when(block == blocks - 1)
    def _() -> None:
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)


def _softmax(q: jax.Array, k: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Returns exp(scores - max) [rows, N] and its sum over keys [rows, 1], both float32, of one head's q and k."""
    scores = _dot(q, k, 1, 1) * q.shape[-1] ** -0.5
    if tokens < k.shape[0]:
        key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where(key < tokens, scores, MASKED)
    weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    return weights, jnp.sum(weights, axis=1, keepdims=True)


def _dot(a: jax.Array, b: jax.Array, a_dimension: int, b_dimension: int) -> jax.Array:
    contract = (((a_dimension,), (b_dimension,)), ((), ()))
    return jax.lax.dot_general(a, b, contract, preferred_element_type=jnp.float32)


def _heads(lanes: int, head: int) -> list[slice]:
    return [slice(start, start + head) for start in range(0, lanes, head)]

"""Attention over tokens that are split over the devices of the axis `context`, by one of two algorithms.

Ring attention (Liu et al. 2023, arXiv:2310.01889) sends keys and values from device to device round a ring, until every
query has attended to all of them. All-to-all attention (Jacobs et al. 2023, DeepSpeed-Ulysses, arXiv:2309.14509) first
exchanges tokens for heads, so that a device attends over all tokens of a few heads, and then exchanges back. Both use a
softmax that is computed one chunk of keys at a time (Milakov and Gimelshein 2018, arXiv:1805.02867) and computed again
in the backward pass, so that the [N, N] attention weights are never stored. The arrays hold `padded_length` tokens;
padding at the end is never attended to.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from vit_dist.config import ConfigError
from vit_dist.mesh import layout

CHUNK = 1024  # the largest number of keys that the queries attend to at once
MASKED = -1e30  # the score of padding; finite, because a chunk may hold padding only and inf - inf is NaN
SPLIT_BY_HEADS = ("batch", None, "all_to_all_heads", None)
(AXIS,) = layout.TABLE["tokens"]


def check(algorithm: str, implementation: str, heads: int, attention_dropout: float, sizes: dict[str, int]) -> None:
    """Checks that a model's tokens can be split over a mesh.

    Args:
      algorithm: `model.context_attention`.
      implementation: `model.attention`.
      heads: `model.heads`.
      attention_dropout: `model.attention_dropout`.
      sizes: the mesh's axes and their sizes.

    Raises:
      ConfigError: the mesh has an axis `context`, and the algorithm does not support one of the other settings.
    """
    if sizes.get(AXIS, 1) == 1:
        return
    if algorithm == "ring" and implementation == "cudnn":
        raise ConfigError(
            "model.attention: cudnn has no ring attention; take auto or xla, or model.context_attention=all_to_all"
        )
    if attention_dropout:
        raise ConfigError(
            f"model.attention_dropout: must be 0 with mesh.{AXIS}={sizes[AXIS]}, which never makes the weights that it "
            f"would drop, found {attention_dropout}; take 0 or mesh.{AXIS}=1"
        )
    if algorithm == "all_to_all":
        layout.check_divides("model.heads", heads, "all_to_all_heads", sizes)


def padded_length(tokens: int, shards: int) -> int:
    """Returns the least number of tokens, at least `tokens`, that splits into equal shards of equal chunks."""
    unit = shards * math.ceil(tokens / (shards * CHUNK))
    return math.ceil(tokens / unit) * unit


def ring_attention(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int) -> jax.Array:
    """Computes attention over q, k, v [B, N, H, d] that are split by tokens, of which the first `tokens` are real.

    While a device computes, it sends the keys and values that it holds to the next device; a ring of n devices does so
    n - 1 times. The backward pass sends the gradients of keys and values round the same ring, and every device adds its
    own; two sends after the loop bring them back to the device that owns the keys. The result [B, N, H, d] is laid out
    like q.
    """
    return _attention(q, k, v, tokens, True)


def chunked_attention(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int) -> jax.Array:
    """Computes attention over q, k, v [B, N, H, d] that are not split by tokens; the first `tokens` are real.

    The result [B, N, H, d] is laid out like q.
    """
    return _attention(q, k, v, tokens, False)


def all_to_all_attention(q: jax.Array, k: jax.Array, v: jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
    """Calls `attend(q, k, v)` on arrays split by heads; q, k, v and the result are [B, N, H, d] split by tokens."""
    by_tokens, by_heads = layout.spec_of(q), layout.spec(*SPLIT_BY_HEADS)

    def exchange(split_axis: int, concat_axis: int, x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, AXIS, split_axis, concat_axis, tiled=True)

    to_heads = _on_every_device(functools.partial(exchange, 2, 1), (by_tokens,), by_heads)
    to_tokens = _on_every_device(functools.partial(exchange, 1, 2), (by_heads,), by_tokens)
    return to_tokens(attend(to_heads(q), to_heads(k), to_heads(v)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int, in_ring: bool) -> jax.Array:
    return _forward(q, k, v, tokens, in_ring)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int, in_ring: bool) -> tuple[jax.Array, tuple]:
    split, rows = layout.spec_of(q), _spec_of_rows(q)
    local = functools.partial(_local_forward, tokens, in_ring)
    out, logsumexp = _on_every_device(local, (split,) * 3, (split, rows))(q, k, v)
    # Named like the output of any attention, so that `remat="names"` keeps both and does not repeat the ring.
    out, logsumexp = checkpoint_name(out, "attention"), checkpoint_name(logsumexp, "attention")
    return out, (q, k, v, out, logsumexp)


def _backward(tokens: int, in_ring: bool, saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    split, rows = layout.spec_of(g), _spec_of_rows(g)
    local = functools.partial(_local_backward, tokens, in_ring)
    return _on_every_device(local, (*(split,) * 4, rows, split), (split,) * 3)(*saved, g)


_attention.defvjp(_forward, _backward)


def _local_forward(tokens: int, in_ring: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes a device's output [b, n, h, d] and the log-sum-exp of its scores [b, h, n] from q, k, v [b, n, h, d]."""
    scaled = q * q.shape[-1] ** -0.5

    def attend_chunk(state: tuple, keys_and_values: tuple, start: jax.Array) -> tuple[tuple, None]:
        highest, total, mixed = state  # the maximum score so far, the sum of weights and the weighted sum of values
        k, v = keys_and_values
        scores = _scores(scaled, k, start, tokens)
        new = jnp.maximum(highest, jnp.max(scores, axis=-1))
        weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
        total = total * shrink + jnp.sum(weights, axis=-1)
        mixed = mixed * shrink[..., None] + _einsum("bhqk,bkhd->bhqd", weights.astype(v.dtype), v)
        return (new, total, mixed), None

    batch, count, heads, size = q.shape
    rows = (batch, heads, count)
    state = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((*rows, size)))
    devices, index = _ring_position(in_ring)

    def ring_step(carry: tuple, step: jax.Array) -> tuple[tuple, None]:
        state, keys_and_values = carry
        received = _send_to_next(keys_and_values)  # started before it is needed, to overlap with the computation
        return (_over_chunks(attend_chunk, state, keys_and_values, index - step, devices)[0], received), None

    keys_and_values = (k, v)
    if devices > 1:
        (state, keys_and_values), _ = jax.lax.scan(ring_step, (state, keys_and_values), jnp.arange(devices - 1))
    highest, total, mixed = _over_chunks(attend_chunk, state, keys_and_values, index - (devices - 1), devices)[0]
    out = (mixed / total[..., None]).swapaxes(1, 2).astype(q.dtype)
    return out, highest + jnp.log(total)


def _local_backward(
    tokens: int, in_ring: bool, q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, logsumexp: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Computes one device's gradients of q, k and v [b, n, h, d] from g, that of the output (Dao et al. 2022)."""
    scale = q.shape[-1] ** -0.5
    scaled = q * scale
    # The inner product of output and its gradient, row by row: [b, h, n].
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)

    def attend_chunk_backward(q_gradient: jax.Array, keys_and_values: tuple, start: jax.Array) -> tuple:
        k, v = keys_and_values
        weights = jnp.exp(_scores(scaled, k, start, tokens) - logsumexp[..., None])
        v_gradient = _einsum("bhqk,bqhd->bkhd", weights.astype(g.dtype), g)
        weights_gradient = _einsum("bqhd,bkhd->bhqk", g, v)
        scores_gradient = (weights * (weights_gradient - delta[..., None])).astype(q.dtype)
        k_gradient = _einsum("bhqk,bqhd->bkhd", scores_gradient, scaled)
        return q_gradient + _einsum("bhqk,bkhd->bqhd", scores_gradient, k), (k_gradient, v_gradient)

    devices, index = _ring_position(in_ring)

    def ring_step(carry: tuple, step: jax.Array) -> tuple[tuple, None]:
        q_gradient, keys_and_values, gradients = carry
        received, gradients = _send_to_next(keys_and_values), _send_to_next(gradients)  # overlap with the computation
        q_gradient, added = _over_chunks(attend_chunk_backward, q_gradient, keys_and_values, index - step, devices)
        return (q_gradient, received, jax.tree.map(jnp.add, gradients, added)), None

    keys_and_values, gradients = (k, v), (jnp.zeros(k.shape), jnp.zeros(v.shape))
    q_gradient = jnp.zeros(q.shape)
    if devices > 1:
        carry = (q_gradient, keys_and_values, gradients)
        (q_gradient, keys_and_values, gradients), _ = jax.lax.scan(ring_step, carry, jnp.arange(devices - 1))
        gradients = _send_to_next(gradients)
    owner = index - (devices - 1)
    q_gradient, added = _over_chunks(attend_chunk_backward, q_gradient, keys_and_values, owner, devices)
    gradients = jax.tree.map(jnp.add, gradients, added)
    if devices > 1:
        gradients = _send_to_next(gradients)  # the keys' last device is the one before their owner in the ring
    return (q_gradient * scale).astype(q.dtype), gradients[0].astype(k.dtype), gradients[1].astype(v.dtype)


def _scores(q: jax.Array, k: jax.Array, start: jax.Array, tokens: int) -> jax.Array:
    """Multiplies queries by keys, of which the first is token `start`: float32 [b, h, nq, nk], with padding masked."""
    scores = _einsum("bqhd,bkhd->bhqk", q, k)
    return jnp.where(start + jnp.arange(k.shape[1]) < tokens, scores, MASKED)


def _einsum(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def _over_chunks(function: Callable, state: Any, keys_and_values: tuple, owner: Any, devices: int) -> tuple[Any, Any]:
    """Scans a function over the chunks of one device's keys and values.

    Args:
      function: maps (state, (keys, values), number of the first key) to (new state, output); a chunk is
        [b, chunk, h, d], and so are the arrays of the output.
      state: the state before the first chunk.
      keys_and_values: two arrays [b, n, h, d].
      owner: the index in the ring, modulo `devices`, of the device that the keys and values belong to.
      devices: the number of devices in the ring.

    Returns:
      The last state, and the outputs of all chunks joined to arrays [b, n, h, d].
    """
    length = keys_and_values[0].shape[1]
    count = next(n for n in range(math.ceil(length / CHUNK), length + 1) if length % n == 0)
    first = owner % devices * length
    if count == 1:
        return function(state, keys_and_values, first)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], count, length // count, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], length, *x.shape[3:])

    starts = first + jnp.arange(0, length, length // count)
    chunks = (jax.tree.map(cut, keys_and_values), starts)
    state, outputs = jax.lax.scan(lambda state, chunk: function(state, *chunk), state, chunks)
    return state, jax.tree.map(join, outputs)


def _ring_position(in_ring: bool) -> tuple[int, Any]:
    """Returns the number of devices in the ring and this device's index; (1, 0) outside a ring."""
    return (jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)) if in_ring else (1, 0)


def _send_to_next(arrays: tuple) -> tuple:
    """Sends each device's arrays to the next device of the ring, and returns those of the one before."""
    devices = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(arrays, AXIS, [(i, (i + 1) % devices) for i in range(devices)])


def _spec_of_rows(x: jax.Array) -> PartitionSpec:
    """Returns the layout of [B, H, N] for x [B, N, H, d]."""
    batch, tokens, heads, _ = jax.typeof(x).sharding.spec.partitions
    return PartitionSpec(batch, heads, tokens)


def _on_every_device(function: Callable, inputs: tuple, outputs: Any) -> Callable:
    """Returns a function of global arrays that calls `function` on every device's shards."""
    return jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)

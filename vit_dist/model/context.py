"""Attention over tokens that are split over the devices of the axis `context`, in one of two ways.

Ring attention (Liu et al. 2023, arXiv:2310.01889) passes keys and values from neighbour to neighbour until each has
met every query. All-to-all attention (Jacobs et al. 2023, DeepSpeed-Ulysses, arXiv:2309.14509) trades tokens for
heads, so that a device attends with all tokens of a few heads, and trades back. Both rest on `chunked`: a softmax
made chunk of keys by chunk of keys (Milakov and Gimelshein 2018, arXiv:1805.02867) and made again in the backward
pass, so that the [N, N] weights exist nowhere. The arrays hold tokens up to a `padded_length`; what lies past the
last real token is never a key.
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

CHUNK = 1024  # at most so many keys meet the queries at once
HIDDEN = -1e30  # the score of padding; finite, for a chunk may hold nothing else and inf - inf is no number
TRADED = ("batch", None, "traded_heads", None)
(AXIS,) = layout.TABLE["tokens"]


def check(kind: str, implementation: str, heads: int, attention_dropout: float, sizes: dict[str, int]) -> None:
    """Raises `ConfigError` where a model cannot have its tokens split over a mesh of these sizes.

    kind: `model.context_attention`. implementation: `model.attention`.
    """
    if sizes.get(AXIS, 1) == 1:
        return
    if kind == "ring" and implementation == "cudnn":
        raise ConfigError(
            "model.attention: cudnn knows no ring; take auto or xla, or model.context_attention=all_to_all"
        )
    if attention_dropout:
        raise ConfigError(
            f"model.attention_dropout: must be 0 with mesh.{AXIS}={sizes[AXIS]}, which never makes the weights that it "
            f"would drop, found {attention_dropout}; take 0 or mesh.{AXIS}=1"
        )
    if kind == "all_to_all":
        layout.check_divides("model.heads", heads, "traded_heads", sizes)


def padded_length(tokens: int, parts: int) -> int:
    """The least number of tokens, real ones and padding, that splits into equal parts, and these into equal chunks."""
    unit = parts * math.ceil(tokens / (parts * CHUNK))
    return math.ceil(tokens / unit) * unit


def ring(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int) -> jax.Array:
    """Attention of [B, N, H, d], of which `tokens` are real, over tokens split over the ring; as its inputs are laid.

    Each device sends its keys and values to the next as it computes, one step less than there are devices. In the
    backward pass their gradients travel with them, from zeros on the first step, and one step more brings these home.
    """
    return _attention(q, k, v, tokens, True)


def chunked(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int) -> jax.Array:
    """Attention of [B, N, H, d], of which `tokens` are real and all on each device; as its inputs are laid."""
    return _attention(q, k, v, tokens, False)


def all_to_all(q: jax.Array, k: jax.Array, v: jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
    """`attend` of [B, N, H, d], split by tokens, on arrays that are split by heads in their stead."""
    by_tokens, by_heads = layout.of(q), layout.spec(*TRADED)

    def trade(split: int, joined: int, x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, AXIS, split, joined, tiled=True)

    there = _on_each(functools.partial(trade, 2, 1), (by_tokens,), by_heads)
    back = _on_each(functools.partial(trade, 1, 2), (by_heads,), by_tokens)
    return back(attend(there(q), there(k), there(v)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int, travel: bool) -> jax.Array:
    return _forward(q, k, v, tokens, travel)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int, travel: bool) -> tuple[jax.Array, tuple]:
    split, rows = layout.of(q), _rows(q)
    local = functools.partial(_local_forward, tokens, travel)
    out, logsumexp = _on_each(local, (split,) * 3, (split, rows))(q, k, v)
    # Named as the output of any attention is, so that `remat="names"` keeps both and goes round the ring no more.
    out, logsumexp = checkpoint_name(out, "attention"), checkpoint_name(logsumexp, "attention")
    return out, (q, k, v, out, logsumexp)


def _backward(tokens: int, travel: bool, saved: tuple, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    split, rows = layout.of(g), _rows(g)
    local = functools.partial(_local_backward, tokens, travel)
    return _on_each(local, (*(split,) * 4, rows, split), (split,) * 3)(*saved, g)


_attention.defvjp(_forward, _backward)


def _local_forward(tokens: int, travel: bool, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One device's part: q, k, v [b, n, h, d] -> output [b, n, h, d] and log sum exp of the scores [b, h, n]."""
    scaled = q * q.shape[-1] ** -0.5

    def meet(state: tuple, keys: tuple, start: jax.Array) -> tuple[tuple, None]:
        highest, total, mixed = state
        k, v = keys
        scores = _scores(scaled, k, start, tokens)
        new = jnp.maximum(highest, jnp.max(scores, axis=-1))
        weights, shrink = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
        total = total * shrink + jnp.sum(weights, axis=-1)
        mixed = mixed * shrink[..., None] + _product("bhqk,bkhd->bhqd", weights.astype(v.dtype), v)
        return (new, total, mixed), None

    batch, count, heads, size = q.shape
    rows = (batch, heads, count)
    state = (jnp.full(rows, HIDDEN), jnp.zeros(rows), jnp.zeros((*rows, size)))
    parts, place = _ring(travel)

    def turn(carry: tuple, step: jax.Array) -> tuple[tuple, None]:
        state, keys = carry
        coming = _pass_on(keys)  # asked for before it is needed, so that it travels while this device computes
        return (_over_chunks(meet, state, keys, place - step, parts)[0], coming), None

    keys = (k, v)
    if parts > 1:
        (state, keys), _ = jax.lax.scan(turn, (state, keys), jnp.arange(parts - 1))
    highest, total, mixed = _over_chunks(meet, state, keys, place - (parts - 1), parts)[0]
    out = (mixed / total[..., None]).swapaxes(1, 2).astype(q.dtype)
    return out, highest + jnp.log(total)


def _local_backward(
    tokens: int, travel: bool, q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, logsumexp: jax.Array,
    g: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """One device's part: gradients of q, k and v [b, n, h, d], where g is that of the output (Dao et al. 2022)."""
    scale = q.shape[-1] ** -0.5
    scaled = q * scale
    drift = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1).swapaxes(1, 2)  # [b, h, n]

    def meet(q_gradient: jax.Array, keys: tuple, start: jax.Array) -> tuple[jax.Array, tuple]:
        k, v = keys
        weights = jnp.exp(_scores(scaled, k, start, tokens) - logsumexp[..., None])
        v_gradient = _product("bhqk,bqhd->bkhd", weights.astype(g.dtype), g)
        of_weights = _product("bqhd,bkhd->bhqk", g, v)
        of_scores = (weights * (of_weights - drift[..., None])).astype(q.dtype)
        k_gradient = _product("bhqk,bqhd->bkhd", of_scores, scaled)
        return q_gradient + _product("bhqk,bkhd->bqhd", of_scores, k), (k_gradient, v_gradient)

    parts, place = _ring(travel)

    def turn(carry: tuple, step: jax.Array) -> tuple[tuple, None]:
        q_gradient, keys, gradients = carry
        coming, gradients = _pass_on(keys), _pass_on(gradients)  # both travel while this device computes
        q_gradient, own = _over_chunks(meet, q_gradient, keys, place - step, parts)
        return (q_gradient, coming, jax.tree.map(jnp.add, gradients, own)), None

    keys, gradients = (k, v), (jnp.zeros(k.shape), jnp.zeros(v.shape))
    q_gradient = jnp.zeros(q.shape)
    if parts > 1:
        (q_gradient, keys, gradients), _ = jax.lax.scan(turn, (q_gradient, keys, gradients), jnp.arange(parts - 1))
        gradients = _pass_on(gradients)
    q_gradient, own = _over_chunks(meet, q_gradient, keys, place - (parts - 1), parts)
    gradients = jax.tree.map(jnp.add, gradients, own)
    if parts > 1:
        gradients = _pass_on(gradients)  # the last to meet a device's keys is its neighbour on the other side
    return (q_gradient * scale).astype(q.dtype), gradients[0].astype(k.dtype), gradients[1].astype(v.dtype)


def _scores(q: jax.Array, k: jax.Array, start: jax.Array, tokens: int) -> jax.Array:
    """Products of queries and keys, float32 [b, h, nq, nk]; the first key is token number `start`."""
    scores = _product("bqhd,bkhd->bhqk", q, k)
    return jnp.where(start + jnp.arange(k.shape[1]) < tokens, scores, HIDDEN)


def _product(how: str, one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.einsum(how, one, other, preferred_element_type=jnp.float32)


def _over_chunks(meet: Callable, state: Any, keys: tuple, owner: Any, parts: int) -> tuple[Any, Any]:
    """`meet(state, keys, start)` for each chunk of the keys and values [b, n, h, d] of device `owner` of the ring.

    The last state, and what `meet` gives for each chunk [b, chunk, h, d] put together to [b, n, h, d].
    """
    length = keys[0].shape[1]
    count = next(each for each in range(math.ceil(length / CHUNK), length + 1) if length % each == 0)
    first = owner % parts * length
    if count == 1:
        return meet(state, keys, first)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], count, length // count, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], length, *x.shape[3:])

    starts = first + jnp.arange(0, length, length // count)
    state, found = jax.lax.scan(lambda state, xs: meet(state, *xs), state, (jax.tree.map(cut, keys), starts))
    return state, jax.tree.map(join, found)


def _ring(travel: bool) -> tuple[int, Any]:
    """How many devices there are in the ring, and which of them this is; one, where keys do not travel."""
    return (jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)) if travel else (1, 0)


def _pass_on(arrays: tuple) -> tuple:
    """Each device's arrays to the next of the ring."""
    parts = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(arrays, AXIS, [(i, (i + 1) % parts) for i in range(parts)])


def _rows(x: jax.Array) -> PartitionSpec:
    """The layout of [B, H, N], where x is [B, N, H, d]."""
    batch, tokens, heads, _ = jax.typeof(x).sharding.spec.partitions
    return PartitionSpec(batch, heads, tokens)


def _on_each(function: Callable, inputs: tuple, outputs: Any) -> Callable:
    """The function of one device's parts, run on every device."""
    return jax.shard_map(function, in_specs=inputs, out_specs=outputs, check_vma=False)

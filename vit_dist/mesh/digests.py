"""Digests of arrays that do not depend on how the arrays are split over devices.

An array's digest is a sum, over its elements, of a hash of the element's bits and of its index in the whole array. Each
device adds up the elements that it holds, and the mesh adds up the sums: no array is gathered. A change of one element
always changes the digest; damage to many goes unnoticed with a probability of 2**-40 or less. `of_numpy` computes the
same on the host.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

_STEP = np.uint32(0x9E3779B1)  # an index is multiplied by it, so that neighbours differ in many bits
_FIRST, _SECOND = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)  # of the finalizer of MurmurHash3
_BLOCK = 1 << 16  # elements that numpy hashes at a time: they stay in the cache of a core

Digest = tuple[int, int]  # two sums modulo 2**32


def text(digest: Digest) -> str:
    """Returns a digest in 16 hexadecimal digits."""
    return f"{digest[0]:08x}{digest[1]:08x}"


def of_numpy(part: np.ndarray, shape: Sequence[int] | None = None, starts: Sequence[int] | None = None) -> Digest:
    """Returns the digest of an array, or the share in it of a part. Shares are added up by `add`.

    Args:
      part: the array, or a box of it.
      shape: that of the whole array; None: the part is all of it.
      starts: the index of the part's first element in the whole array; None: of zeros.
    """
    words, shape = _numpy_words(part), [*(part.shape if shape is None else shape)]
    starts = [*(starts or [0] * part.ndim)] + [0] * (words.ndim - part.ndim)
    shape += words.shape[part.ndim :]
    strides = [math.prod(shape[dimension + 1 :]) for dimension in range(words.ndim)]
    base = sum(start * stride for start, stride in zip(starts, strides, strict=True))
    return add([_of_block(*block) for block in _blocks(words, strides, base)])


def add(digests: Sequence[Digest]) -> Digest:
    """Returns the digest of an array from the shares of its parts."""
    return sum(one[0] for one in digests) & 0xFFFFFFFF, sum(one[1] for one in digests) & 0xFFFFFFFF


@functools.lru_cache(maxsize=64)
def on_devices(mesh: Mesh, specs: tuple[PartitionSpec, ...]) -> Callable[..., jax.Array]:
    """Returns a compiled function of arrays, laid out on a mesh by these specs, for their digests on each device.

    The function's result is uint32 [devices, arrays, 2], with the devices' own digests: copies of an array that differ
    have different ones.
    """
    axes = tuple(mesh.axis_names)

    def digests_of_shards(*shards: jax.Array) -> jax.Array:
        sums = [_of_shard(shard, spec, mesh) for shard, spec in zip(shards, specs, strict=True)]
        groups: dict[tuple[str, ...], list[int]] = {}
        for number, spec in enumerate(specs):
            groups.setdefault(tuple(axis for entry in spec for axis in _names(entry)), []).append(number)
        for split, numbers in groups.items():
            if split:
                added = jax.lax.psum(jnp.stack([sums[number] for number in numbers]), split)
                for place, number in enumerate(numbers):
                    sums[number] = added[place]
        return jnp.stack(sums)[None]

    split = jax.shard_map(digests_of_shards, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(axes), check_vma=False)
    return jax.jit(split)


@functools.partial(jax.jit, static_argnums=(1, 2))  # traced once for all arrays of a shape and layout
def _of_shard(shard: jax.Array, spec: PartitionSpec, mesh: Mesh) -> jax.Array:
    """Returns the share of one device's part of an array in the array's digest, uint32 [2]."""
    words = _words(shard)
    shape = [size * math.prod(mesh.shape[axis] for axis in _entry(spec, d)) for d, size in enumerate(shard.shape)]
    shape += words.shape[shard.ndim :]
    index = jnp.zeros((), jnp.uint32)
    for dimension, size in enumerate(words.shape):
        stride = math.prod(shape[dimension + 1 :]) & 0xFFFFFFFF
        place = jnp.zeros((), jnp.uint32)
        for axis in _entry(spec, dimension):
            place = place * np.uint32(mesh.shape[axis]) + jax.lax.axis_index(axis).astype(jnp.uint32)
        along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dimension) + place * np.uint32(size)
        index = index + along * np.uint32(stride)
    key = index * _STEP
    mixed = _mix(words, key)
    # One reduction of pairs: XLA's CPU compiler would make two passes of two, each three times as long.
    pairs, zeros = (mixed, mixed * (key | np.uint32(1))), (np.uint32(0), np.uint32(0))
    every = tuple(range(words.ndim))
    return jnp.stack(jax.lax.reduce(pairs, zeros, lambda one, other: (one[0] + other[0], one[1] + other[1]), every))


def _mix(words: Any, key: Any) -> Any:
    """Returns hashes of words, each with the key of its index: for one key, different words have different hashes."""
    mixed = words ^ key
    mixed = (mixed ^ (mixed >> np.uint32(16))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint32(13))) * _SECOND
    return mixed ^ (mixed >> np.uint32(16))


def _words(array: jax.Array) -> jax.Array:
    """Returns the bits of the elements as uint32; an element of eight bytes becomes two, along a new last axis."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    size = array.dtype.itemsize
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _numpy_words(array: np.ndarray) -> np.ndarray:
    """Returns what `_words` does, as unsigned numbers of their own size."""
    array = np.ascontiguousarray(array).reshape(array.shape)
    size = array.dtype.itemsize
    if size > 4:
        return array[..., None].view(np.uint32)
    return array.view({1: np.uint8, 2: np.uint16}.get(size, np.uint32))


def _blocks(words: np.ndarray, strides: Sequence[int], base: int) -> Iterator[tuple[np.ndarray, Sequence[int], int]]:
    """Yields the words in small blocks, each with its strides in the whole array and the index of its first word."""
    if words.ndim > 1 and strides[-2] == strides[-1] * words.shape[-1]:  # the last two axes follow one another
        words = words.reshape(*words.shape[:-2], -1)
        yield from _blocks(words, [*strides[:-2], strides[-1]], base)
    elif words.size <= _BLOCK:
        yield words, strides, base
    elif len(words) == 1:
        yield from _blocks(words[0], strides[1:], base)
    else:
        rows = max(1, _BLOCK * len(words) // words.size)
        for row in range(0, len(words), rows):
            yield from _blocks(words[row : row + rows], strides, base + row * strides[0])


def _of_block(words: np.ndarray, strides: Sequence[int], base: int) -> Digest:
    """Returns the share of a block in the digest."""
    index: Any = np.uint32(base & 0xFFFFFFFF)
    for dimension, (size, stride) in enumerate(zip(words.shape, strides, strict=True)):
        along = np.arange(size, dtype=np.uint32) * np.uint32(stride & 0xFFFFFFFF)
        index = index + along.reshape(-1, *[1] * (words.ndim - dimension - 1))
    key = np.atleast_1d(index) * _STEP
    mixed = _mix(words.astype(np.uint32), key)
    return int(mixed.sum(dtype=np.uint64)), int((mixed * (key | np.uint32(1))).sum(dtype=np.uint64))


def _entry(spec: PartitionSpec, dimension: int) -> tuple[str, ...]:
    return _names(spec[dimension]) if dimension < len(spec) else ()


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)

"""Many arrays in few kernels: gradients are reduced, and norms are taken, over all arrays of a tree together.

A ViT whose blocks are not stacked has over a hundred vectors, and a kernel for each takes longer to launch than to run.
Their gradients are therefore reduced as one array, and the optimizer reads slices of it: XLA fuses the updates of
arrays of one shape if they read the same array. Every large array is read once: the sums of squares of its rows belong
to the fusion that updates it.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vit_dist.mesh import layout

SMALL = 2**16  # elements; a GPU reads as many in less time than it takes to launch a kernel
_SUMS = 256  # of an array's rows, or more: enough to occupy a GPU


def reduce_gradients(gradients: Any, parameters: Any) -> Any:
    """Reduces gradients and splits them as their parameters are stored, as `layout.as_stored` does.

    Small gradients that are not split are one array while they are reduced, and slices of it in the result.
    """
    leaves, structure = jax.tree.flatten(gradients)
    result = list(leaves)
    together: dict[Any, list[int]] = {}
    for i, (leaf, stored) in enumerate(zip(leaves, jax.tree.leaves(parameters), strict=True)):
        if leaf.size <= SMALL and not layout.split_axes(leaf) and not layout.split_axes(stored):
            together.setdefault((leaf.dtype, layout.unreduced_axes(leaf)), []).append(i)
        else:
            result[i] = layout.as_stored(leaf, stored)
    for rows in together.values():
        flat = jnp.concatenate([layout.flat(leaves[i]) for i in rows])
        # The barrier keeps it one array: XLA would read the pieces instead, and not fuse what reads them.
        flat = jax.lax.optimization_barrier(layout.replicated(flat))
        for i, piece in zip(rows, jax.lax.split(flat, [leaves[i].size for i in rows]), strict=True):
            result[i] = piece.reshape(leaves[i].shape)
    return jax.tree.unflatten(structure, result)


def norm(tree: Any) -> jax.Array:
    """Returns the square root of the sum of all squares in a tree of arrays, float32, without gathering any of them."""
    leaves = jax.tree.leaves(tree)
    if not leaves:
        return jnp.zeros(())
    axes = [layout.split_axes(leaf) for leaf in leaves]

    def sum_of_squares(*shards: jax.Array) -> jax.Array:
        total = jnp.zeros(())
        for group in dict.fromkeys(axes):
            own = _sum_of_squares([shard for shard, split in zip(shards, axes, strict=True) if split == group])
            total += jax.lax.psum(own, group) if group else own
        return total

    if any(axes):
        specs = tuple(layout.spec_of(leaf) for leaf in leaves)
        sum_of_squares = jax.shard_map(sum_of_squares, in_specs=specs, out_specs=PartitionSpec())
    return jnp.sqrt(sum_of_squares(*leaves))


def _sum_of_squares(arrays: Sequence[jax.Array]) -> jax.Array:
    """Returns the sum of squares of one device's arrays."""
    small = [array.reshape(-1) for array in arrays if array.size <= SMALL]
    sums = [_sums_of_squares(array) for array in arrays if array.size > SMALL]
    if small:
        sums.append(jnp.square(jnp.concatenate(small)))
    # Behind a barrier, or XLA would sum each array by itself, in two kernels.
    return jnp.sum(jax.lax.optimization_barrier(jnp.concatenate(sums)))


def _sums_of_squares(array: jax.Array) -> jax.Array:
    """Returns at least `_SUMS` sums of squares, of the leading dimensions' rows, 1-D."""
    counts = (math.prod(array.shape[:dimension]) for dimension in range(array.ndim))
    rows = next((dimension for dimension, count in enumerate(counts) if count >= _SUMS), array.ndim)
    return jnp.sum(jnp.square(array), axis=tuple(range(rows, array.ndim))).reshape(-1)

"""The one table that maps dimensions to mesh axes, and the few functions that move an array between layouts.

Every dimension that may be split has a logical name. A parameter is made with the names of its dimensions, and `spec`
turns them into a `PartitionSpec` for the mesh in use (`jax.set_mesh`). A change to a row of `TABLE` reaches the whole
system: initialisation, the step, the checkpoint, the memory report.

A parameter is stored split (`spec`) and used gathered (`gathered`). The type of a gathered parameter is "reduced" over
the axes that split examples and tokens: every device holds the same values, and the gradient must be summed over those
axes. The backward pass of `gathered` makes that sum (a reduce-scatter over `fsdp`, an all-reduce over `data` and
`context`). For axes deferred by `defer_reduction`, `as_stored` makes it, once for all micro-batches.

An activation carries its layout in its own type (`spec_of`), so that layers need no argument for it. Without a mesh
every function here is the identity, so that a model also runs on one device with no setup.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from vit_dist.config import ConfigError
from vit_dist.schema import nearest_multiples

TABLE: dict[str, tuple[str, ...]] = {
    "batch": ("dcn_data", "data", "fsdp"),  # examples: replicas and fully sharded devices alike take a share of them
    "tokens": ("context",),  # of activations only, between the embedding and the pooling
    "width": ("fsdp",),  # of parameters only: a layer gathers it before use
    "heads": ("tensor",),  # attention heads, of parameters and of activations
    "mlp": ("tensor",),  # the MLP's hidden units, of parameters and of activations
    "all_to_all_heads": ("tensor", "context"),  # heads of activations inside all-to-all attention
    # Every other dimension (pixels of a patch, classes, the stack of blocks) is complete on every device. Classes are
    # deliberately not split: 10 or 1,000 rarely divide by an axis, and the head is a thousandth of the model.
}


def spec(*names: str | None) -> PartitionSpec | None:
    """Returns the `PartitionSpec` of an array whose dimensions have these logical names (None: never split).

    Returns None without a mesh, which means "unspecified" to `out_sharding=`.
    """
    return PartitionSpec(*(_axes(name) for name in names)) if _mesh_axes() else None


def spec_of(x: jax.Array, dimensions: int | None = None, *names: str | None) -> PartitionSpec | None:
    """Returns the `PartitionSpec` of x, or of an array that is split like x in its first dimensions only.

    Args:
      x: an array, traced or not.
      dimensions: how many leading dimensions to take from x; None takes all.
      *names: the logical names of the dimensions that follow them.

    Returns:
      The `PartitionSpec`; None without a mesh.
    """
    if not _mesh_axes():
        return None
    return PartitionSpec(*jax.typeof(x).sharding.spec.partitions[:dimensions], *(_axes(name) for name in names))


def stored_spec(parameter: jax.Array) -> PartitionSpec | None:
    """Returns the `PartitionSpec` of a parameter, with the axes over which its gradient is still to be summed."""
    return jax.typeof(parameter).sharding.spec if _mesh_axes() else None


def shard_count(name: str) -> int:
    """Returns the number of shards into which the current mesh splits a dimension of this name; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in TABLE[name] if axis in mesh.axis_names)


def shard_count_of(split: PartitionSpec | None, dimension: int) -> int:
    """Returns the number of shards into which the current mesh splits a dimension of an array of this layout."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if split is None else math.prod(mesh.shape[axis] for axis in _as_tuple(split.partitions[dimension]))


def reshard(array: jax.Array, *names: str | None) -> jax.Array:
    """Returns the array split by these names. Splitting a replicated array needs no communication."""
    partition_spec = spec(*names)
    if partition_spec is None:
        return array
    return jax.sharding.reshard(array, PartitionSpec(*partition_spec, reduced=jax.typeof(array).sharding.spec.reduced))


def batch_axes() -> tuple[str, ...]:
    """Returns the axes of the current mesh that split the batch, outermost first; empty if none does."""
    return tuple(axis for axis in TABLE["batch"] if axis in _mesh_axes())


def gathered(parameter: jax.Array, activations: PartitionSpec | None) -> jax.Array:
    """Gathers a parameter over `fsdp` for a product with activations of this layout.

    The gradient comes back reduced and split as the parameter is stored.
    """
    if activations is None:
        return parameter
    used = _axes_in(activations)
    stored = jax.typeof(parameter).sharding.spec
    partitions = (None if axes in TABLE["width"] else axes for axes in stored.partitions)
    reduced = stored.reduced | used.intersection(TABLE["batch"] + TABLE["tokens"])
    return jax.sharding.reshard(parameter, PartitionSpec(*partitions, reduced=reduced))


def broadcast(parameter: jax.Array, shape: tuple[int, ...], activations: PartitionSpec | None) -> jax.Array:
    """Broadcasts a gathered parameter [..., n] along leading axes to activations of this shape and layout.

    Activations are split by batch and a parameter is not, so an addition or product must name the layout of its result.
    """
    dimensions = tuple(range(len(shape) - parameter.ndim, len(shape)))
    return jax.lax.broadcast_in_dim(parameter, shape, dimensions, out_sharding=activations)


def joined(array: jax.Array, start: int, stop: int | None = None) -> jax.Array:
    """Returns the array with its dimensions from `start` to before `stop` joined to one; None: to the last.

    Only the first of them may be split; so is then the joined one.
    """
    stop = array.ndim if stop is None else stop
    if stop - start == 1:
        return array
    shape = (*array.shape[:start], math.prod(array.shape[start:stop]), *array.shape[stop:])
    split = stored_spec(array)
    if split is not None:
        partitions = (*split.partitions[: start + 1], *split.partitions[stop:])
        split = PartitionSpec(*partitions, reduced=split.reduced)
    return jax.lax.reshape(array, shape, out_sharding=split)


def product_spec(x: jax.Array, kernel: jax.Array) -> PartitionSpec | None:
    """Returns the `PartitionSpec` of the product of x [..., I] and a gathered kernel [I, O]: [..., O]."""
    if not _mesh_axes():
        return None
    rows, columns = jax.typeof(x).sharding.spec.partitions[:-1], jax.typeof(kernel).sharding.spec.partitions[1:]
    return PartitionSpec(*rows, *columns)


def partial_sum_spec(x: jax.Array, kernel: jax.Array) -> PartitionSpec | None:
    """Returns the `PartitionSpec` of an array like x [..., I], of which every device holds a summand.

    It is the product of an array [..., O] and the transpose of a gathered kernel [I, O] whose columns may be split.
    """
    if not _mesh_axes():
        return None
    columns = jax.typeof(kernel).sharding.spec.partitions[1]
    return PartitionSpec(*jax.typeof(x).sharding.spec.partitions, unreduced=frozenset(_as_tuple(columns)))


def summed(parts: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the sum over devices of an array with the layout of `partial_sum_spec`, laid out like x."""
    return jax.sharding.reshard(parts, spec_of(x)) if _mesh_axes() else parts


def replicated(array: jax.Array) -> jax.Array:
    """Returns the array with a full copy on every device."""
    return jax.sharding.reshard(array, PartitionSpec()) if _mesh_axes() else array


def defer_reduction(parameter: jax.Array, gather: str) -> jax.Array:
    """Types the parameter so that its gradient stays unreduced and can first be summed over micro-batches.

    Args:
      parameter: an array as it is stored.
      gather: "microbatch" leaves the parameter as it is stored and defers the reduction over the axes that do not split
        it: `data`, and `fsdp` too for a parameter that is complete on every device; "step" gathers it here, once, and
        defers both.

    Returns:
      The same values; see `as_stored` for the way back of the gradient.
    """
    if not _mesh_axes():
        return parameter
    if gather == "step":
        return gathered(parameter, spec("batch"))
    reduced = frozenset(batch_axes()).difference(split_axes(parameter))
    stored = jax.typeof(parameter).sharding.spec
    return jax.sharding.reshard(parameter, PartitionSpec(*stored.partitions, reduced=reduced))


def as_stored(gradient: jax.Array, parameter: jax.Array) -> jax.Array:
    """Reduces a gradient that is still unreduced, and splits it as its parameter is stored."""
    if not _mesh_axes():
        return gradient
    return jax.sharding.reshard(gradient, jax.typeof(parameter).sharding.spec)


def split_axes(array: jax.Array) -> tuple[str, ...]:
    """Returns the mesh axes that split an array, in the order of the mesh."""
    if not _mesh_axes():
        return ()
    used = _axes_in(jax.typeof(array).sharding.spec)
    return tuple(axis for axis in _mesh_axes() if axis in used)


def unreduced_axes(array: jax.Array) -> frozenset[str]:
    """Returns the mesh axes over which an array still has to be summed."""
    return jax.typeof(array).sharding.spec.unreduced if _mesh_axes() else frozenset()


def flat(array: jax.Array) -> jax.Array:
    """Returns an array that no axis splits, as one dimension; what is unreduced stays so."""
    out_sharding = PartitionSpec(None, unreduced=unreduced_axes(array)) if _mesh_axes() else None
    return jax.lax.reshape(array, (array.size,), out_sharding=out_sharding)


def gradient_spec(parameter: jax.Array, order: Sequence[int]) -> PartitionSpec | None:
    """Returns the `PartitionSpec` of a gathered parameter's unreduced gradient, its dimensions in this order."""
    if not _mesh_axes():
        return None
    stored = jax.typeof(parameter).sharding.spec
    return PartitionSpec(*(stored.partitions[dimension] for dimension in order), unreduced=stored.reduced)


def unreduced_zeros(parameter: jax.Array) -> jax.Array:
    """Returns float32 zeros to sum the gradients of a parameter that went through `defer_reduction`."""
    if not _mesh_axes():
        return jax.numpy.zeros(parameter.shape)
    stored = jax.typeof(parameter).sharding.spec
    zeros = jax.numpy.zeros(parameter.shape, out_sharding=PartitionSpec(*stored.partitions))
    return jax.sharding.reshard(zeros, PartitionSpec(*stored.partitions, unreduced=stored.reduced))


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree of arrays or `jax.ShapeDtypeStruct`s, by their shardings."""

    def size(leaf: Any) -> int:
        split = leaf.sharding is not None and tuple(leaf.sharding.spec)
        return math.prod(leaf.sharding.shard_shape(leaf.shape) if split else leaf.shape) * np.dtype(leaf.dtype).itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def check_divides(key: str, size: int, name: str, sizes: dict[str, int], micro_batches: int = 1) -> None:
    """Checks that a size can be split as the dimension of this name is.

    Args:
      key: the config key of the size, for the error.
      size: its value.
      name: a logical name, a key of `TABLE`.
      sizes: the mesh's axes and their sizes.
      micro_batches: a further divisor of the size.

    Raises:
      ConfigError: the size does not divide; the message names the nearest sizes that do.
    """
    axes = {axis: sizes[axis] for axis in TABLE[name] if sizes.get(axis, 1) > 1}
    divisor = math.prod(axes.values()) * micro_batches
    if size % divisor:
        factors = [f"mesh.{axis}={count}" for axis, count in axes.items()]
        factors += [f"accumulate_steps={micro_batches}"] if micro_batches > 1 else []
        raise ConfigError(
            f"{key}: {size} does not divide over {' x '.join(factors)}; take {nearest_multiples(size, divisor)}"
        )


def _axes_in(partition_spec: PartitionSpec) -> set[str]:
    """Returns the mesh axes in the partitions of a `PartitionSpec`."""
    return {axis for axes in partition_spec.partitions for axis in _as_tuple(axes)}


def _as_tuple(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else axes if isinstance(axes, tuple) else (axes,)


def _mesh_axes() -> tuple[str, ...]:
    return jax.sharding.get_abstract_mesh().axis_names


def _axes(name: str | None) -> str | tuple[str, ...] | None:
    if name is None:
        return None
    axes = tuple(axis for axis in TABLE[name] if axis in _mesh_axes())
    return axes if len(axes) > 1 else axes[0] if axes else None

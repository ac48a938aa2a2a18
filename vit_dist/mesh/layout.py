"""The one table that says which mesh axes split which dimension, and the few ways an array moves between layouts.

Every dimension that may be split has a logical name. A parameter is made with the names of its dimensions, and
`spec` turns them into a `PartitionSpec` for the mesh in use (`jax.set_mesh`). Change a row of `TABLE` and the whole
system follows: initialisation, the step, the checkpoint, the memory report.

A parameter lives split (`spec`) and is used whole (`gathered`). What `gathered` returns is typed "reduced" over the
axes that split the examples and tokens it meets: every device holds the same values, and their gradient is a sum over
those axes that has not been made yet. The sum is made where the type says so: in the backward pass of `gathered`
itself (a reduce-scatter over `fsdp`, an all-reduce over `data` and `context`), or, for parameters that went through
`postponed` first, once after all micro-batches. Activations carry their layout in their own type (`of`), so a layer
need not be told it. Without a mesh all of this is the identity, so that a model runs on one device with no ceremony.
"""

import math
from collections.abc import Sequence

import jax
from jax.sharding import PartitionSpec

from vit_dist.config import ConfigError, nearest_multiples

TABLE: dict[str, tuple[str, ...]] = {
    "batch": ("dcn_data", "data", "fsdp"),  # examples: replicas and fully-sharded shards alike take their part
    "tokens": ("context",),  # of activations only, between the embedding and the pooling
    "width": ("fsdp",),  # of parameters only: a layer gathers it before use
    "heads": ("tensor",),  # attention heads, of parameters and of activations
    "mlp": ("tensor",),  # the MLP's hidden units, of parameters and of activations
    "traded_heads": ("tensor", "context"),  # heads where all-to-all attention has given its tokens for them
    # Anything else (pixels of a patch, classes, the stack of blocks) is whole on every device. Classes are not split,
    # knowingly: 10 or 1,000 rarely divide by an axis, and the head is a thousandth of the model.
}


def spec(*names: str | None) -> PartitionSpec | None:
    """The `PartitionSpec` of an array whose dimensions have these logical names (None: never split).

    None without a mesh, which is what `out_sharding=` takes for "no opinion".
    """
    return PartitionSpec(*(_axes(name) for name in names)) if _mesh_axes() else None


def of(x: jax.Array, dimensions: int | None = None, *names: str | None) -> PartitionSpec | None:
    """The layout of x; or of an array whose first `dimensions` are split as those of x, and the others by these names.

    None without a mesh.
    """
    if not _mesh_axes():
        return None
    return PartitionSpec(*jax.typeof(x).sharding.spec.partitions[:dimensions], *(_axes(name) for name in names))


def parts(name: str) -> int:
    """Into how many parts the current mesh splits a dimension of this name; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in TABLE[name] if axis in mesh.axis_names)


def placed(array: jax.Array, *names: str | None) -> jax.Array:
    """The array split by these names; where it was whole before, every device keeps its part and nothing travels."""
    split = spec(*names)
    if split is None:
        return array
    return jax.sharding.reshard(array, PartitionSpec(*split, reduced=jax.typeof(array).sharding.spec.reduced))


def batch_axes() -> tuple[str, ...]:
    """The axes of the current mesh that split the batch, outermost first; empty where none does."""
    return tuple(axis for axis in TABLE["batch"] if axis in _mesh_axes())


def gathered(parameter: jax.Array, activations: PartitionSpec | None) -> jax.Array:
    """The parameter whole over `fsdp`, ready to meet activations of this layout; its gradient is split as it lives."""
    if activations is None:
        return parameter
    met = {axis for axes in activations.partitions for axis in (axes if isinstance(axes, tuple) else (axes,))}
    own = jax.typeof(parameter).sharding.spec
    whole = (None if axes in TABLE["width"] else axes for axes in own.partitions)
    reduced = own.reduced | met.intersection(TABLE["batch"] + TABLE["tokens"])
    return jax.sharding.reshard(parameter, PartitionSpec(*whole, reduced=reduced))


def broadcast(parameter: jax.Array, shape: tuple[int, ...], activations: PartitionSpec | None) -> jax.Array:
    """A gathered parameter [..., n] against activations of this shape and layout, by its last axes.

    Activations are split by batch and a parameter is not, so an addition or product must say which layout results.
    """
    dimensions = tuple(range(len(shape) - parameter.ndim, len(shape)))
    return jax.lax.broadcast_in_dim(parameter, shape, dimensions, out_sharding=activations)


def replicated(array: jax.Array) -> jax.Array:
    """The array whole on every device."""
    return jax.sharding.reshard(array, PartitionSpec()) if _mesh_axes() else array


def postponed(parameter: jax.Array, gather: str) -> jax.Array:
    """The parameter typed so that its gradient stays unreduced, to be summed over many micro-batches first.

    gather: "microbatch" leaves the parameter split over `fsdp` and postpones the reduction over `data` alone; "step"
    gathers it here, once, and postpones both.
    """
    if not _mesh_axes():
        return parameter
    if gather == "step":
        return gathered(parameter, spec("batch"))
    reduced = frozenset(batch_axes()) - frozenset(TABLE["width"])
    split = jax.typeof(parameter).sharding.spec
    return jax.sharding.reshard(parameter, PartitionSpec(*split.partitions, reduced=reduced))


def as_stored(gradient: jax.Array, parameter: jax.Array) -> jax.Array:
    """A gradient, unreduced or not, brought to the layout in which its parameter lives."""
    if not _mesh_axes():
        return gradient
    return jax.sharding.reshard(gradient, jax.typeof(parameter).sharding.spec)


def gradient_spec(parameter: jax.Array, order: Sequence[int]) -> PartitionSpec | None:
    """The `PartitionSpec` of a gathered parameter's gradient, not summed yet, with its dimensions in this order."""
    if not _mesh_axes():
        return None
    own = jax.typeof(parameter).sharding.spec
    return PartitionSpec(*(own.partitions[dimension] for dimension in order), unreduced=own.reduced)


def unreduced_zeros(parameter: jax.Array) -> jax.Array:
    """The sum of no gradients yet, for a parameter that went through `postponed`; float32."""
    if not _mesh_axes():
        return jax.numpy.zeros(parameter.shape)
    own = jax.typeof(parameter).sharding.spec
    zeros = jax.numpy.zeros(parameter.shape, out_sharding=PartitionSpec(*own.partitions))
    return jax.sharding.reshard(zeros, PartitionSpec(*own.partitions, unreduced=own.reduced))


def check_divides(key: str, size: int, name: str, sizes: dict[str, int], times: int = 1) -> None:
    """Raises `ConfigError` where `size` (the value of config key `key`) cannot be split as dimension `name` is.

    sizes: the mesh's axes and their sizes. times: a further factor, such as the micro-batches of a batch.
    """
    axes = {axis: sizes[axis] for axis in TABLE[name] if sizes.get(axis, 1) > 1}
    parts = times
    for count in axes.values():
        parts *= count
    if size % parts:
        factors = [f"mesh.{axis}={count}" for axis, count in axes.items()]
        factors += [f"accumulate_steps={times}"] if times > 1 else []
        raise ConfigError(
            f"{key}: {size} does not divide over {' x '.join(factors)}; take {nearest_multiples(size, parts)}"
        )


def _mesh_axes() -> tuple[str, ...]:
    return jax.sharding.get_abstract_mesh().axis_names


def _axes(name: str | None) -> str | tuple[str, ...] | None:
    if name is None:
        return None
    axes = tuple(axis for axis in TABLE[name] if axis in _mesh_axes())
    return axes if len(axes) > 1 else axes[0] if axes else None

"""Muon for the kernels inside the blocks, on any mesh.

Newton-Schulz needs complete matrices, and parameters are split. But the blocks are a stack of such matrices, so the
stack is distributed over the devices instead: each device orthogonalises the matrices that it receives, and the
results return to the layout in which the parameters are stored. The momentum stays split throughout.
"""

import re
from collections.abc import Mapping

import jax
import optax
import optax.contrib
from jax.sharding import PartitionSpec

# The root mean square of an update before the learning rate. It is that of AdamW's updates, so that the same learning
# rate suits both halves of the model (Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982).
RMS = 0.2


def is_stacked(path: str) -> bool:
    """Returns whether the parameter of this path has a leading axis with one slice per block.

    True for `blocks/mlp/up/kernel`, False for `blocks/3/mlp/up/kernel` (`model.scan=False`).
    """
    return re.match(r"blocks/\D", path) is not None


def is_matrix(path: str) -> bool:
    """Returns whether Muon updates the parameter of this path, a kernel in a block; Adam updates the others."""
    return path.startswith("blocks/") and path.endswith("/kernel")


def scale_by_muon(momentum: float, nesterov: bool, moment_dtype: str) -> optax.GradientTransformation:
    """Makes the transformation to orthogonalised momentum (Jordan et al. 2024), for the kernels of `is_matrix`.

    Kernels may be stacked [L, ...] or not. All heads of an attention form one matrix, but queries, keys and values are
    three: qkv [L, D, 3, H, d] is L * 3 matrices [D, H * d], projection [L, H, d, D] is L matrices [H * d, D].
    """
    return optax.chain(
        optax.trace(momentum, nesterov=nesterov, accumulator_dtype=moment_dtype),
        optax.stateless(lambda updates, _: jax.tree.map_with_path(_orthogonalise, updates)),
    )


def _orthogonalise(path: tuple, kernel: jax.Array) -> jax.Array:
    if is_stacked(jax.tree_util.keystr(path, simple=True, separator="/")):
        return _orthogonalise_stack(kernel)
    return _orthogonalise_stack(kernel[None])[0]


def _orthogonalise_stack(kernels: jax.Array) -> jax.Array:
    """Makes each matrix of a stack nearly orthogonal; the result is laid out like `kernels`."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names:
        return _newton_schulz(kernels)
    route = _route(kernels.shape[0], jax.typeof(kernels).sharding.spec, mesh.shape)
    for layout in route:
        kernels = jax.sharding.reshard(kernels, layout)
    kernels = jax.shard_map(_newton_schulz, in_specs=route[-1], out_specs=route[-1])(kernels)
    for layout in reversed(route):
        kernels = jax.sharding.reshard(kernels, layout)
    return kernels


def _route(depth: int, split: PartitionSpec, sizes: Mapping[str, int]) -> list[PartitionSpec]:
    """Returns the layouts from `split` to one that splits only the stack of `depth` matrices.

    Each layout moves one mesh axis, which XLA compiles to one all-to-all; if several axes moved at once, XLA would
    gather the full arrays on every device. An axis that does not divide the rest of the stack is gathered instead, and
    its devices repeat the same work.
    """
    stack_axes: tuple[str, ...] = ()
    route, shards = [split], 1
    for axis, size in reversed(list(sizes.items())):
        if depth % (shards * size) == 0:
            stack_axes, shards = (*stack_axes, axis), shards * size
        matrix_axes = [None if name == axis else name for name in route[-1][1:]]
        route.append(PartitionSpec(stack_axes or None, *matrix_axes))
    return route


def _newton_schulz(kernels: jax.Array) -> jax.Array:
    """Applies optax's Muon without momentum, which is `optax.trace` here so that it need not be gathered."""
    numbers = {3: (1, 2), 4: ((1, 2), 3), 5: (1, (3, 4))}[kernels.ndim]
    muon = optax.contrib.muon(
        learning_rate=-1.0,  # optax descends; sign and learning rate come later in the chain
        beta=0.0,
        nesterov=False,
        consistent_rms=RMS,
        muon_weight_dimension_numbers=[optax.contrib.MuonDimensionNumbers(*numbers)],
    )
    updates, _ = muon.update([kernels], muon.init([kernels]), [kernels])
    return updates[0]

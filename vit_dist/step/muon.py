"""Muon for the kernels inside the blocks, on any mesh.

Newton-Schulz needs each matrix whole, and parameters are split. But the blocks are a stack of such matrices, so the
stack is dealt out over the devices, each orthogonalises the matrices it got, and the results go back to the layout in
which the parameters live. The momentum stays split all along.
"""

import re
from collections.abc import Mapping

import jax
import optax
import optax.contrib
from jax.sharding import PartitionSpec

# Root mean square of an update, times the learning rate: AdamW's, so that one rate suits both halves of the model
# (Liu et al. 2025, "Muon is Scalable for LLM Training", arXiv:2502.16982).
RMS = 0.2


def is_stacked(path: str) -> bool:
    """Whether the parameter of this path, such as `blocks/mlp/up/kernel`, has one slice a block.

    `blocks/3/mlp/up/kernel` (`model.scan=False`) has not.
    """
    return re.match(r"blocks/\D", path) is not None


def is_matrix(path: str) -> bool:
    """Whether Muon updates the parameter of this path: the kernels in the blocks; Adam has the rest."""
    return path.startswith("blocks/") and path.endswith("/kernel")


def scale_by_muon(momentum: float, nesterov: bool, moment_dtype: str) -> optax.GradientTransformation:
    """Momentum, orthogonalised (Jordan et al. 2024), for kernels, stacked [L, ...] or not; see `is_matrix`.

    An attention head's columns lie beside those of the others in one matrix, but queries, keys and values are three:
    qkv [L, D, 3, H, d] is L * 3 matrices [D, H * d], projection [L, H, d, D] is L matrices [H * d, D].
    """
    return optax.chain(
        optax.trace(momentum, nesterov=nesterov, accumulator_dtype=moment_dtype),
        optax.stateless(lambda updates, _: jax.tree.map_with_path(_by_stack, updates)),
    )


def _by_stack(path: tuple, kernel: jax.Array) -> jax.Array:
    if is_stacked(jax.tree_util.keystr(path, simple=True, separator="/")):
        return _orthogonalised(kernel)
    return _orthogonalised(kernel[None])[0]


def _orthogonalised(kernels: jax.Array) -> jax.Array:
    """Each matrix of the stack made near orthogonal, in the layout of `kernels`."""
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
    """The layouts from `split` to one whose only split dimension is the stack of `depth` matrices.

    They differ by one axis each, which XLA turns into one all-to-all; several at once it does by gathering everything
    everywhere. An axis that does not divide what is left of the stack is gathered, and its devices do the same work.
    """
    dealt: tuple[str, ...] = ()
    route, parts = [split], 1
    for axis, size in reversed(list(sizes.items())):
        if depth % (parts * size) == 0:
            dealt, parts = (*dealt, axis), parts * size
        within = [None if name == axis else name for name in route[-1][1:]]
        route.append(PartitionSpec(dealt or None, *within))
    return route


def _newton_schulz(kernels: jax.Array) -> jax.Array:
    """optax's Muon without its momentum (which is `optax.trace` here, so that it need not be gathered)."""
    numbers = {3: (1, 2), 4: ((1, 2), 3), 5: (1, (3, 4))}[kernels.ndim]
    muon = optax.contrib.muon(
        learning_rate=-1.0,  # optax descends; the sign and the rate are the chain's
        beta=0.0,
        nesterov=False,
        consistent_rms=RMS,
        muon_weight_dimension_numbers=[optax.contrib.MuonDimensionNumbers(*numbers)],
    )
    updates, _ = muon.update([kernels], muon.init([kernels]), [kernels])
    return updates[0]

"""Makes a layer's parameters, and reads them for use.

A layer stores its parameters in float32, split by the table in `mesh.layout`, and gathers them in the dtype of its
input when it runs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from vit_dist.mesh import layout

Names = tuple[str | None, ...]


def make_parameter(rngs: nnx.Rngs, initializer: Callable, shape: tuple[int, ...], names: Names) -> nnx.Param:
    """Makes a float32 parameter that is split by the logical names of its dimensions."""
    return nnx.Param(initializer(rngs.params(), shape, jnp.float32, out_sharding=layout.spec(*names)))


def cast_and_gather(parameter: nnx.Param, dtype: jnp.dtype, activations: PartitionSpec | None) -> jax.Array:
    """Returns the parameter's value in `dtype`, gathered for a product with activations of this layout.

    The cast comes first, so that a gather in bfloat16 moves half the bytes.
    """
    return layout.gathered(parameter[...].astype(dtype), activations)

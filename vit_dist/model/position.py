"""Position embeddings of patches: fixed ones, and the addition of either kind; learned ones are parameters of `ViT`."""

from typing import Any

import jax
import jax.numpy as jnp

from vit_dist.mesh import layout


def sincos2d(rows: int, columns: int, width: int, temperature: float = 10_000.0) -> jax.Array:
    """Returns embeddings [rows * columns, width], row by row: a quarter each of sin x, cos x, sin y, cos y.

    The form is that of MoCo v3 (Chen et al. 2021, arXiv:2104.02057), with the wave numbers of the plain ViT baselines
    (Beyer et al. 2022, arXiv:2205.01580): from 1 down to 1 / temperature, both included. `width` must divide by 4.
    """
    y, x = jnp.mgrid[:rows, :columns]
    omega = temperature ** -(jnp.arange(width // 4) / max(width // 4 - 1, 1))
    y, x = (jnp.outer(axis.reshape(-1), omega) for axis in (y, x))
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)


@jax.custom_vjp
def add_to_each(x: jax.Array, table: jax.Array) -> jax.Array:
    """Adds a gathered table [N, D] to each example of x [B, N, D].

    The derivative is JAX's own in other words: the table's gradient, a sum over examples, is written as a product with
    ones. For a plain sum XLA's GPU compiler stores all activations with the batch innermost, and transposes them
    wherever a product or a norm needs them otherwise.
    """
    return x + layout.broadcast(table, x.shape, layout.spec_of(x))


def _add_forward(x: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    return add_to_each(x, table), table


def _add_backward(table: jax.Array, g: jax.Array) -> tuple[jax.Array, Any]:
    ones = jnp.ones(g.shape[:1], g.dtype, out_sharding=layout.spec("batch"))
    split = layout.gradient_spec(table, (0, 1))
    return g, jax.lax.dot_general(ones, g, (((0,), (0,)), ((), ())), out_sharding=split)


add_to_each.defvjp(_add_forward, _add_backward)

"""Fixed position embeddings of patches; learned ones are parameters of `model.vit.ViT`."""

import jax
import jax.numpy as jnp


def sincos2d(rows: int, columns: int, width: int, temperature: float = 10_000.0) -> jax.Array:
    """Returns embeddings [rows * columns, width], row by row: a quarter each of sin x, cos x, sin y, cos y.

    The form is that of MoCo v3 (Chen et al. 2021, arXiv:2104.02057), with the wave numbers of the plain ViT baselines
    (Beyer et al. 2022, arXiv:2205.01580): from 1 down to 1 / temperature, both included. `width` must divide by 4.
    """
    y, x = jnp.mgrid[:rows, :columns]
    omega = temperature ** -(jnp.arange(width // 4) / max(width // 4 - 1, 1))
    y, x = (jnp.outer(axis.reshape(-1), omega) for axis in (y, x))
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)

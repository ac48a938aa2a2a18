"""Position embeddings of patches: fixed ones to add, the addition, and rotations of queries and keys.

Learned ones are parameters of `ViT`.
"""

import math
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


Rotation = tuple[jax.Array, jax.Array]  # cosines and sines [N, d / 2] of the angles by which a head of d channels turns


def rope2d(
    grid: tuple[int, int], size: int, base: float, stretch: jax.Array | None = None, *, before: int = 0, after: int = 0
) -> Rotation:
    """Returns the rotation of each token of an image, for heads of `size` channels.

    A quarter of the angles go by row and column each: 2 pi c / p, where c in (-1, 1) is the centre of the patch along
    that side of the image, and p are periods from 1 up to, but without, `base`, at equal ratios (Heo et al. 2024,
    arXiv:2403.13298, with the coordinates of DINOv3, Siméoni et al. 2025, arXiv:2508.10104).

    Args:
      grid: patches down and across.
      size: a multiple of 4.
      base: see above.
      stretch: factors [2] of the coordinates down and across; None: 1.
      before: the number of tokens before the patches, which are not turned.
      after: the number of tokens after them.
    """
    centres = jnp.meshgrid(*((2 * jnp.arange(side) + 1) / side - 1 for side in grid), indexing="ij")
    coordinates = jnp.stack(centres, -1).reshape(-1, 2)
    if stretch is not None:
        coordinates = coordinates * stretch
    periods = base ** (jnp.arange(size // 4) / (size // 4))
    angles = 2 * math.pi * coordinates[:, :, None] / periods
    angles = jnp.pad(angles.reshape(-1, size // 2), ((before, after), (0, 0)))
    return jnp.cos(angles), jnp.sin(angles)


def random_stretch(key: jax.Array, jitter: float, rescale: float) -> jax.Array:
    """Draws factors [2] for `rope2d`: between jitter and 1 / jitter each, times one in the range of rescale for both.

    They are uniform in their logarithm, as in DINOv3.
    """
    draws = jax.random.uniform(key, (3,), minval=-1, maxval=1)
    return jnp.exp(draws[:2] * math.log(jitter) + draws[2] * math.log(rescale))


@jax.custom_vjp
def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Turns each pair of channels (i, i + d / 2) of x [B, N, H, d] by the angles of its token; computed in float32.

    It is linear in x and keeps the rotation alone. The rotation itself has no gradient.
    """
    cosine, sine = (
        jax.lax.broadcast_in_dim(one, (*x.shape[:3], one.shape[1]), (1, 3), out_sharding=layout.spec_of(x))
        for one in rotation
    )
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1).astype(x.dtype)


def _rotate_forward(x: jax.Array, rotation: Rotation) -> tuple[jax.Array, Rotation]:
    return rotate(x, rotation), rotation


def _rotate_backward(rotation: Rotation, g: jax.Array) -> tuple[jax.Array, None]:
    cosine, sine = rotation
    return rotate(g, (cosine, -sine)), None


rotate.defvjp(_rotate_forward, _rotate_backward)

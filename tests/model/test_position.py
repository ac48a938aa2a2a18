"""Fixed positions against a definition written out number by number; the derivative of adding a table."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives import FLOAT32_ERROR, check_bfloat16, check_float32, check_second, distance, random, wide

from vit_dist.mesh import layout
from vit_dist.mesh.topology import make_mesh
from vit_dist.model.position import Rotation, add_to_each, random_stretch, rope2d, rotate, sincos2d


@pytest.mark.parametrize(("rows", "columns", "width"), [(3, 3, 16), (2, 5, 8), (4, 1, 4)])
def test_sincos2d_is_sin_x_cos_x_sin_y_cos_y_at_geometric_wave_numbers(rows: int, columns: int, width: int) -> None:
    quarter = width // 4
    waves = [10_000 ** -(i / (quarter - 1)) if i else 1.0 for i in range(quarter)]
    expected = [
        [f(side * wave) for side, f in ((x, math.sin), (x, math.cos), (y, math.sin), (y, math.cos)) for wave in waves]
        for y in range(rows)  # patches go row by row
        for x in range(columns)
    ]
    np.testing.assert_allclose(sincos2d(rows, columns, width), expected, atol=1e-6)


def test_every_two_positions_have_distinct_embeddings() -> None:
    table = np.asarray(sincos2d(14, 14, 64))
    distances = np.linalg.norm(table[:, None] - table[None], axis=-1) + 10 * np.eye(196)
    assert distances.min() > 0.5
    np.testing.assert_allclose(np.linalg.norm(table, axis=1), math.sqrt(32), rtol=1e-5)  # sin^2 + cos^2 = 1, 32 times
    assert table.dtype == jnp.float32


def plain_sum(x: jax.Array, table: jax.Array) -> jax.Array:
    return x + layout.broadcast(table, x.shape, layout.spec_of(x))


def test_the_gradients_of_adding_a_table_are_those_of_a_plain_sum() -> None:
    arguments = random(16, 6, 8), random(6, 8, seed=1)
    check_float32(add_to_each, plain_sum, arguments)
    check_bfloat16(add_to_each, plain_sum, arguments)
    check_second(add_to_each, plain_sum, arguments)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}], ids=str)
def test_a_tables_gradient_is_summed_over_a_mesh(sizes: dict[str, int], dtype: Any) -> None:
    g = jnp.asarray(random(16, 6, 8, seed=2), dtype)

    def gradient(add: Any) -> Any:
        """That of a table which is stored split by `fsdp`."""

        def score(stored: jax.Array, x: jax.Array, g: jax.Array) -> jax.Array:
            table = layout.gathered(stored, layout.spec("batch", None, None))
            table = layout.reshard(table, "tokens", None)  # as `ViT.embed` splits it
            return jnp.sum((add(x, table) * g).astype(jnp.float32))

        with jax.set_mesh(make_mesh(sizes, jax.devices())):
            split = layout.spec("batch", "tokens", None)
            stored = jax.device_put(jnp.asarray(random(6, 8, seed=1), dtype), layout.spec(None, "width"))
            found = jax.jit(jax.grad(score))(stored, *(jax.device_put(one, split) for one in (jnp.zeros_like(g), g)))
            assert found.sharding.spec == stored.sharding.spec
            return found

    exact = np.asarray(g, np.float64).sum(0)
    slack = FLOAT32_ERROR * np.linalg.norm(exact)
    assert distance(gradient(add_to_each), exact) <= distance(gradient(plain_sum), exact) + slack
    if dtype == jnp.float32:
        assert distance(gradient(add_to_each), exact) <= slack


def test_rope2d_turns_by_two_pi_times_the_centre_of_the_patch_over_each_period() -> None:
    rows, columns, size, base = 3, 2, 8, 50.0
    cosine, sine = rope2d((rows, columns), size, base, before=2, after=1)
    periods = [1.0, math.sqrt(base)]
    expected = [[0.0] * 4] * 2
    for y in (-2 / 3, 0, 2 / 3):  # patches go row by row; an image's sides are from -1 to 1
        expected += [[2 * math.pi * c / period for c in (y, x) for period in periods] for x in (-0.5, 0.5)]
    expected += [[0.0] * 4]
    np.testing.assert_allclose(cosine, np.cos(expected), atol=1e-6)
    np.testing.assert_allclose(sine, np.sin(expected), atol=1e-6)


def test_rope2d_stretches_rows_and_columns_by_a_factor_each() -> None:
    plain, stretched = rope2d((3, 2), 8, 100.0), rope2d((3, 2), 8, 100.0, jnp.array([2.0, 3.0]))
    angles, wider = (np.arctan2(sine, cosine) for cosine, sine in (plain, stretched))
    turns = (wider - angles * np.repeat([2.0, 3.0], 2)) / (2 * math.pi)
    np.testing.assert_allclose(turns, np.round(turns), atol=1e-6)


def test_a_random_stretch_is_uniform_in_its_logarithm_and_shares_the_rescaling() -> None:
    keys = jax.random.split(jax.random.key(0), 4000)
    logarithms = np.log(jax.vmap(lambda key: random_stretch(key, 1.2, 2.0))(keys))
    both, each = math.log(2.0), math.log(1.2)
    assert np.abs(logarithms).max() <= both + each
    np.testing.assert_allclose(logarithms.var(0), (both**2 + each**2) / 3, rtol=0.06)
    assert np.cov(logarithms.T)[0, 1] == pytest.approx(both**2 / 3, rel=0.08)
    assert np.abs(logarithms.mean(0)).max() < 0.03
    np.testing.assert_allclose(random_stretch(keys[0], 1.0, 1.0), [1, 1])


def plain_rotation(x: jax.Array, rotation: Rotation) -> jax.Array:
    """By complex numbers, without a derivative of its own."""
    cosine, sine = (jnp.asarray(one, wide(x).dtype)[:, None] for one in rotation)
    first, second = jnp.split(wide(x), 2, axis=-1)
    turned = (first + 1j * second) * (cosine + 1j * sine)
    return jnp.concatenate([turned.real, turned.imag], -1).astype(x.dtype)


def test_the_gradients_of_a_rotation_are_those_of_a_plain_one() -> None:
    rotation = rope2d((2, 3), 8, 100.0, before=1)
    arguments = (random(2, 7, 3, 8),)
    ours, plain = (functools.partial(one, rotation=rotation) for one in (rotate, plain_rotation))
    check_float32(ours, plain, arguments)
    check_bfloat16(ours, plain, arguments)
    check_second(ours, plain, arguments)


def test_a_rotation_keeps_the_rotation_alone() -> None:
    x, rotation = random(2, 7, 3, 8), rope2d((2, 3), 8, 100.0, before=1)
    _, pullback = jax.vjp(lambda x: rotate(x, rotation), x)
    assert sorted(leaf.shape for leaf in jax.tree.leaves(pullback)) == [(7, 4), (7, 4)]

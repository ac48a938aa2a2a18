"""The single layers: details that the full model hides, statistics of new kernels, and masks on every mesh."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from vit_dist import config
from vit_dist.mesh import layout
from vit_dist.mesh.topology import make_mesh
from vit_dist.model import kernels, layers
from vit_dist.model.layers import Dense, Mlp, drop_path, dropout, lecun_normal, normal, xavier_uniform
from vit_dist.model.norm import Norm

MODEL = config.Model()
MESHES: list[dict[str, int]] = [{"data": 8}, {"data": 2, "context": 4}, {"data": 2, "fsdp": 2, "tensor": 2}]
NAMES = ("batch", "tokens", "mlp")


def mesh(sizes: dict[str, int]) -> Mesh:
    return make_mesh(sizes, jax.devices())


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_layer_norm_adds_a_millionth_to_the_variance() -> None:
    x = 1e-3 * random(2, 5, 16)  # with a variance as small
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(Norm(MODEL, 16, None, rngs=nnx.Rngs(0))(x), expected, rtol=1e-5, atol=1e-5)


def test_rms_norm_divides_by_the_root_of_the_mean_square_and_has_no_bias() -> None:
    x, model = 2 + random(2, 5, 16), config.Model(norm="rmsnorm", norm_epsilon=0.5)
    norm = Norm(model, 16, None, rngs=nnx.Rngs(0))
    assert norm.bias is None
    np.testing.assert_allclose(norm(x), x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.5), rtol=1e-5)


def test_layer_norm_of_bfloat16_takes_its_statistics_in_float32() -> None:
    x = jnp.asarray(300 + random(1, 1, 256), jnp.bfloat16)  # whose sum of squares bfloat16 could not hold
    y = Norm(MODEL, 256, None, rngs=nnx.Rngs(0))(x)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-6)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, atol=0.02)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "context": 4}], ids=str)
def test_a_norm_on_gpus_runs_over_rows_where_tokens_are_not_split_and_changes_nothing(
    sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, norm = jnp.asarray(random(8, 4, 16)), Norm(MODEL, 16, None, rngs=nnx.Rngs(0))

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(norm.normalise(x)))

    expected = jax.value_and_grad(loss)(x)
    monkeypatch.setattr(kernels, "device", lambda: ("gpu", "any"))
    with jax.set_mesh(mesh(sizes)):
        x = jax.device_put(x, layout.spec("batch", "tokens", None))
        compute = jax.jit(jax.value_and_grad(loss))
        found, joined = compute(x), "[32" in str(jax.make_jaxpr(loss)(x))
    assert joined == ("context" not in sizes)
    for leaf, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-6, atol=1e-6)


def test_xavier_draws_each_matrix_of_a_fused_kernel_uniformly_with_its_own_fans() -> None:
    dense = Dense((96,), (4, 24), (None,) * 3, count=3, rngs=nnx.Rngs(0), initializer=xavier_uniform)
    limit = math.sqrt(6 / (96 + 96))  # of [D, D], not of [D, 3 D]
    for matrix in range(3):
        kernel = np.asarray(dense.kernel[:, matrix])
        assert kernel.var() == pytest.approx(limit**2 / 3, rel=0.03)  # 9,216 draws: a deviation of 0.9 %
        assert 0.998 * limit < np.abs(kernel).max() <= limit
        assert abs(kernel.mean()) < 4 * limit / math.sqrt(3 * kernel.size)


def test_xavier_of_two_contracted_dimensions_takes_their_product_for_its_fan() -> None:
    dense = Dense((4, 24), (32,), (None,) * 3, rngs=nnx.Rngs(0), initializer=xavier_uniform)
    assert np.asarray(dense.kernel[...]).var() == pytest.approx(2 / (96 + 32), rel=0.05)


def test_normal_has_a_deviation_of_two_hundredths_for_any_fans() -> None:
    kernel = np.asarray(normal(64, 999)(jax.random.key(0), (64, 400), jnp.float32, None))
    assert kernel.std() == pytest.approx(0.02, rel=0.02)


def test_lecun_normal_has_variance_one_over_fan_in_and_is_cut_at_two_deviations() -> None:
    kernel = np.asarray(lecun_normal(64, 999)(jax.random.key(0), (64, 400), jnp.float32, None))
    assert kernel.var() == pytest.approx(1 / 64, rel=0.03)
    cut = 2 * math.sqrt(1 / 64) / 0.8796
    assert 0.99 * cut < np.abs(kernel).max() <= 1.0001 * cut
    normal = kernel / kernel.std()
    assert (normal**4).mean() == pytest.approx(2.37, abs=0.08)  # truncated; a full normal has 3, a uniform 1.8


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_zeroes_at_its_rate_and_keeps_the_mean(rate: float) -> None:
    y = np.asarray(dropout(jnp.ones((64, 32, 32)), rate, jax.random.key(0)))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1) / np.float32(1 - rate)}
    assert (y == 0).mean() == pytest.approx(rate, abs=5 * math.sqrt(rate * (1 - rate) / y.size))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_neighbours_are_dropped_independently(axis: int) -> None:
    dropped = np.moveaxis(np.asarray(dropout(jnp.ones((64, 32, 64)), 0.3, jax.random.key(0))) == 0, axis, 0)
    correlation = np.corrcoef(dropped[:-1].ravel(), dropped[1:].ravel())[0, 1]
    assert abs(correlation) < 5 / math.sqrt(dropped.size)


def test_more_tokens_leave_the_mask_of_those_before() -> None:
    short, long = (dropout(jnp.ones((4, tokens, 8)), 0.5, jax.random.key(0)) for tokens in (5, 8))
    np.testing.assert_array_equal(short, long[:, :5])


def test_dropout_without_a_key_or_a_rate_is_the_identity() -> None:
    x = jnp.ones((2, 3, 4))
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x
    assert drop_path(x, 0.5, None) is x
    assert drop_path(x, None, jax.random.key(0)) is x


def test_drop_path_drops_whole_examples_at_its_rate_and_scales_the_rest_up() -> None:
    y = np.asarray(drop_path(jnp.ones((5000, 2, 3)), 0.2, jax.random.key(0))).reshape(5000, 6)
    assert (y == y[:, :1]).all()
    assert set(np.unique(y)) == {np.float32(0), np.float32(1.25)}
    assert (y[:, 0] == 0).mean() == pytest.approx(0.2, abs=5 * math.sqrt(0.16 / 5000))


@pytest.mark.parametrize("tokens", [4, 12])  # an odd number of tokens on some device, and an even one
def test_masks_are_the_same_on_every_mesh(tokens: int) -> None:
    def masks(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jnp.ones((16, tokens, 8), out_sharding=layout.spec(*NAMES))
        return dropout(x, 0.5, key), drop_path(x, 0.5, key)

    on_one_device = jax.jit(masks)(jax.random.key(3))
    for sizes in MESHES:
        with jax.set_mesh(mesh(sizes)):
            on_mesh = jax.jit(masks)(jax.random.key(3))
            assert jax.typeof(on_mesh[0]).sharding.spec == layout.spec(*NAMES)
        for mask, wanted in zip(on_mesh, on_one_device, strict=True):
            np.testing.assert_array_equal(mask, wanted, err_msg=str(sizes))


def test_a_layer_computes_in_the_dtype_of_its_input_and_stores_parameters_in_float32() -> None:
    mlp = Mlp(4, 8, activation="gelu", dropout=0.0, rngs=nnx.Rngs(0), initializer=xavier_uniform)
    assert mlp(jnp.ones((1, 1, 4), jnp.bfloat16), None).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(mlp))} == {jnp.dtype("float32")}
    assert layers.split_key(None, 3) == [None, None, None]

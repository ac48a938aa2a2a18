"""Dropped attention weights, the choice of cuDNN, and the wrapper around cuDNN's kernel with a stand-in for it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from vit_dist.config import ConfigError
from vit_dist.mesh import layout
from vit_dist.mesh.topology import make_mesh
from vit_dist.model import attention
from vit_dist.model.attention import attend, attend_split

HEADS = ("batch", None, "heads", None)  # of queries, keys and values: [B, N, H, d]


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def qkv(tokens: int) -> tuple[Any, Any, Any]:
    q, k, v = (random(8, tokens, 2, 4, seed=seed) for seed in range(3))
    return q, k, v


def test_dropped_attention_weights_are_zero_at_the_rate_and_the_rest_scaled_up() -> None:
    q, k, v = jnp.zeros((32, 40, 2, 40)), jnp.zeros((32, 40, 2, 40)), jnp.zeros((32, 40, 2, 40))
    v = v + jnp.eye(40)[None, :, None, :]  # so that the output is the weights themselves, each 1/40 without dropout
    weights = np.asarray(attend(q, k, v, "xla", 0.25, jax.random.key(0)))
    assert (weights == 0).mean() == pytest.approx(0.25, abs=0.01)
    np.testing.assert_allclose(weights[weights > 0], 1 / 40 / 0.75, rtol=1e-5)
    assert (weights[0] != weights[1]).any() and (weights[:, :, 0] != weights[:, :, 1]).any()
    np.testing.assert_allclose(attend(q, k, v, "xla", 0.25, None), 1 / 40, rtol=1e-5)


def kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    implementation: str,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
) -> jax.Array:
    """A stand-in for cuDNN's kernel: it refuses odd lengths and Explicit axes, and fills padded rows with anything."""
    assert implementation == "cudnn"
    assert q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0
    assert AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types
    full = jnp.full(q.shape[:1], q.shape[1])
    queries = full if query_seq_lengths is None else query_seq_lengths
    keys = full if key_value_seq_lengths is None else key_value_seq_lengths
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    scores = jnp.where(jnp.arange(k.shape[1]) < keys[:, None, None, None], scores, -jnp.inf)
    y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    return jnp.where(jnp.arange(q.shape[1])[:, None, None] < queries[:, None, None, None], y, 7.0)


@pytest.mark.parametrize("tokens", [196, 197])
@pytest.mark.parametrize("sizes", [None, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_cudnn_on_each_devices_examples_and_heads_agrees_with_xla(
    tokens: int, sizes: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def summed(function: Any) -> Any:
        def weighted(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = function(*arrays)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))

    arrays = qkv(tokens)
    expected = summed(lambda q, k, v: attend(q, k, v, "xla"))(*arrays)
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    monkeypatch.setattr(attention, "_on_gpu", lambda: True)
    if sizes is None:
        result = summed(lambda q, k, v: attention._cudnn(q, k, v, tokens))(*arrays)
    else:
        with jax.set_mesh(make_mesh(sizes, jax.devices())):
            result = summed(lambda q, k, v: attention._cudnn(q, k, v, tokens))(
                *(jax.device_put(array, layout.spec(*HEADS)) for array in arrays)
            )
            assert jax.typeof(result[0][1]).sharding.spec == layout.spec(*HEADS)
    assert result[0][1].shape == (8, tokens, 2, 4)
    for leaf, wanted in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=2e-5, atol=2e-6)


def test_cudnn_inside_all_to_all_attention_leaves_padding_out(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = qkv(13)
    expected = attend(*arrays, "xla")
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    monkeypatch.setattr(attention, "_uses_cudnn", lambda *arguments, **keywords: True)
    with jax.set_mesh(make_mesh({"data": 4, "context": 2}, jax.devices())):
        split = layout.spec("batch", "tokens", "heads", None)
        padded = [np.pad(array, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=3) for array in arrays]
        split_attention = jax.jit(lambda q, k, v: attend_split(q, k, v, 13, "all_to_all", "auto", 0.0))
        result = split_attention(*(jax.device_put(array, split) for array in padded))
    np.testing.assert_allclose(np.asarray(result)[:, :13], expected, rtol=2e-5, atol=2e-6)


class CudnnUsed(Exception):
    """Raised in place of the cuDNN kernel."""


def uses_cudnn(monkeypatch: pytest.MonkeyPatch, platform: str, dtype: Any, rate: float = 0.0, **choice: str) -> bool:
    def stop(*arguments: Any) -> jax.Array:
        raise CudnnUsed

    monkeypatch.setattr(attention, "_cudnn", stop)
    device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = AbstractMesh((8,), ("data",), axis_types=(AxisType.Explicit,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        split = NamedSharding(mesh, layout.spec(*HEADS) or PartitionSpec())
        arrays = [jax.ShapeDtypeStruct((8, 6, 2, 8), dtype, sharding=split)] * 3
        try:
            jax.eval_shape(
                lambda q, k, v: attend(q, k, v, choice.get("implementation", "auto"), rate, jax.random.key(0)), *arrays
            )
        except CudnnUsed:
            return True
    return False


def test_auto_uses_cudnn_on_a_mesh_of_gpus_even_absent_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert uses_cudnn(monkeypatch, "gpu", jnp.bfloat16)
    assert uses_cudnn(monkeypatch, "cuda", jnp.bfloat16)


def test_auto_uses_xla_on_other_hardware_in_float32_and_with_dropped_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not uses_cudnn(monkeypatch, "cpu", jnp.bfloat16)
    assert not uses_cudnn(monkeypatch, "tpu", jnp.bfloat16)
    assert not uses_cudnn(monkeypatch, "gpu", jnp.float32)
    assert not uses_cudnn(monkeypatch, "gpu", jnp.bfloat16, rate=0.1)
    assert not uses_cudnn(monkeypatch, "gpu", jnp.bfloat16, implementation="xla")


def test_auto_uses_xla_on_this_host_without_a_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(attention, "_cudnn")
    q, k, v = (jnp.asarray(array, jnp.bfloat16) for array in qkv(5))
    assert attend(q, k, v, "auto").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("platform", "dtype", "rate"), [("cpu", jnp.bfloat16, 0.0), ("gpu", jnp.float32, 0.0), ("gpu", jnp.bfloat16, 0.1)]
)
def test_cudnn_that_does_not_fit_is_an_error_that_names_the_settings_it_needs(
    platform: str, dtype: Any, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ConfigError, match="model.attention: cudnn needs an NVIDIA GPU, heads of a multiple of 8 up to 128, "
    ):
        uses_cudnn(monkeypatch, platform, dtype, rate, implementation="cudnn")


def test_scores_in_bfloat16_are_not_rounded_before_the_softmax() -> None:
    # Scores of 20 + i/64: bfloat16 rounds neighbouring scores to the same number, and their weights would be equal.
    size, keys = 64, 8
    q = jnp.zeros((1, 1, 1, size), jnp.bfloat16).at[..., :2].set(1).at[..., 2:].set(0) * size**0.5
    k = jnp.zeros((1, keys, 1, size), jnp.bfloat16).at[..., 0].set(20)
    k = k.at[0, :, 0, 1].set((jnp.arange(keys) / 64).astype(jnp.bfloat16))
    v = jnp.eye(keys, size, dtype=jnp.bfloat16)[None, :, None]
    weights = np.asarray(attend(q, k, v, "xla"), np.float64)[0, 0, 0, :keys]
    expected = np.exp(np.arange(keys) / 64)
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=4e-3)  # half a unit of bfloat16
    assert weights[-1] / weights[0] > 1.08


def test_attention_in_bfloat16_keeps_the_error_of_its_gradients_below_two_percent() -> None:
    arrays = [random(4, 24, 2, 16, seed=seed) for seed in range(4)]

    def gradients(dtype: Any) -> Any:
        q, k, v, g = (jnp.asarray(array, dtype) for array in arrays)
        return jax.grad(lambda q, k, v: jnp.sum(attend(3 * q, k, v, "xla") * g), argnums=(0, 1, 2))(q, k, v)

    for gradient, expected in zip(gradients(jnp.bfloat16), gradients(jnp.float32), strict=True):
        assert gradient.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(gradient, np.float32) - expected) / np.linalg.norm(expected)
        assert error < 0.02


@pytest.mark.parametrize(("size", "fits"), [(128, True), (136, False), (100, False)])
def test_cudnn_fits_heads_within_its_limit_only(size: int, fits: bool) -> None:
    assert attention.fits_cudnn(on_gpu=True, dtype="bfloat16", head_size=size, drops=False) == fits

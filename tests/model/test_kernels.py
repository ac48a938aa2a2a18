"""The choice of a fused kernel, and the wrapper around cuDNN's with a stand-in for it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from vit_dist import ViT
from vit_dist.config import ConfigError
from vit_dist.mesh import layout
from vit_dist.mesh.topology import make_mesh
from vit_dist.model import kernels, tpu_attention
from vit_dist.model.attention import attend, attend_split

HEADS = ("batch", None, "heads", None)  # of queries, keys and values: [B, N, H, d]


def random(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def qkv(tokens: int) -> tuple[Any, Any, Any]:
    q, k, v = (random(8, tokens, 2, 4, seed=seed) for seed in range(3))
    return q, k, v


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
    if sizes is None:
        result = summed(lambda q, k, v: kernels.run("cudnn", q, k, v, tokens))(*arrays)
    else:
        with jax.set_mesh(make_mesh(sizes, jax.devices())):
            result = summed(lambda q, k, v: kernels.run("cudnn", q, k, v, tokens))(
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
    monkeypatch.setattr(kernels, "chosen", lambda *arguments, **keywords: "cudnn")
    with jax.set_mesh(make_mesh({"data": 4, "context": 2}, jax.devices())):
        split = layout.spec("batch", "tokens", "heads", None)
        padded = [np.pad(array, ((0, 0), (0, 1), (0, 0), (0, 0)), constant_values=3) for array in arrays]
        split_attention = jax.jit(lambda q, k, v: attend_split(q, k, v, 13, "all_to_all", "auto", 0.0))
        result = split_attention(*(jax.device_put(array, split) for array in padded))
    np.testing.assert_allclose(np.asarray(result)[:, :13], expected, rtol=2e-5, atol=2e-6)


def test_the_kernel_of_tpus_inside_all_to_all_attention_leaves_padding_out(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = qkv(13)
    expected = attend(*arrays, "xla")
    monkeypatch.setattr(kernels, "chosen", lambda *arguments, **keywords: "pallas")
    interpreted = functools.partial(tpu_attention.attend_locally, interpret=True)
    monkeypatch.setattr(tpu_attention, "attend_locally", interpreted)
    with jax.set_mesh(make_mesh({"data": 2, "context": 2, "tensor": 2}, jax.devices())):
        split = layout.spec("batch", "tokens", "heads", None)
        padded = [np.pad(array, ((0, 0), (0, 1), (0, 2), (0, 0)), constant_values=3) for array in arrays]
        split_attention = jax.jit(lambda q, k, v: attend_split(q, k, v, 13, "all_to_all", "auto", 0.0))
        result = split_attention(*(jax.device_put(array, split) for array in padded))
    np.testing.assert_allclose(np.asarray(result)[:, :13, :2], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("remat", ["none", "names"])
def test_an_odd_number_of_tokens_is_padded_once_and_nothing_sees_the_padding(
    pool: str, remat: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By cuDNN's stand-in, beside the same with padding in each block for itself."""
    settings: dict[str, Any] = {
        "width": 32, "depth": 2, "mlp": 64, "heads": 4, "image_size": 8, "patch_size": 4, "num_classes": 5,
        "pool": pool, "registers": int(pool == "mean"), "remat": remat, "dtype": "bfloat16", "head_zero_init": False,
    }  # fmt: skip
    images = jnp.asarray(random(4, 8, 8, 3))
    graph, state = nnx.split(ViT(**settings, rngs=nnx.Rngs(0)))

    def loss(state: Any) -> jax.Array:
        return jnp.sum(jnp.sin(nnx.merge(graph, state)(images)))

    def tokens() -> int:
        return nnx.merge(graph, state).embed(images.astype(jnp.bfloat16)).shape[1]

    monkeypatch.setattr(kernels, "device", lambda: ("gpu", "any"))
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    assert tokens() == 6
    found = jax.value_and_grad(loss)(state)
    monkeypatch.setattr(kernels, "padded_length", lambda *arguments, **keywords: 5)
    assert tokens() == 5
    expected = jax.value_and_grad(loss)(state)
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, wanted, atol=0.01 * max(float(jnp.abs(wanted).max()), 1e-3))


def chosen(platform: str, dtype: Any, *, drops: bool = False, implementation: str = "auto") -> str | None:
    """Returns the kernel for 4 heads of 64 over two devices of this platform."""
    device = AbstractDevice(device_kind="any", num_cores=None, platform=platform)
    mesh = AbstractMesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2, abstract_device=device)
    found = []
    with jax.sharding.use_abstract_mesh(mesh):
        split = NamedSharding(mesh, layout.spec(*HEADS) or PartitionSpec())
        queries = jax.ShapeDtypeStruct((8, 6, 4, 64), dtype, sharding=split)
        jax.eval_shape(lambda q: found.append(kernels.chosen(q, implementation, drops=drops)), queries)
    return found[0]


def test_auto_is_the_kernel_of_the_meshs_devices_even_absent_ones() -> None:
    assert chosen("gpu", jnp.bfloat16) == chosen("cuda", jnp.bfloat16) == "cudnn"
    assert chosen("tpu", jnp.bfloat16) == "pallas"


def test_auto_is_xla_on_other_hardware_in_float32_and_with_dropped_weights() -> None:
    assert chosen("cpu", jnp.bfloat16) is None
    for platform in ("gpu", "tpu"):
        assert chosen(platform, jnp.float32) is None
        assert chosen(platform, jnp.bfloat16, drops=True) is None
        assert chosen(platform, jnp.bfloat16, implementation="xla") is None


def test_auto_is_xla_on_this_host_without_a_mesh() -> None:
    q, k, v = (jnp.asarray(array, jnp.bfloat16) for array in qkv(5))
    assert kernels.chosen(q, "auto", drops=False) is None
    assert attend(q, k, v, "auto").dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("platform", "dtype", "drops"),
    [
        ("cpu", jnp.bfloat16, False),
        ("tpu", jnp.bfloat16, False),
        ("gpu", jnp.float32, False),
        ("gpu", jnp.bfloat16, True),
    ],
)
def test_cudnn_that_does_not_fit_is_an_error_that_names_the_settings_it_needs(
    platform: str, dtype: Any, drops: bool
) -> None:
    with pytest.raises(
        ConfigError, match="model.attention: cudnn needs an NVIDIA GPU, heads of a multiple of 8 up to 128, "
    ):
        chosen(platform, dtype, drops=drops, implementation="cudnn")


@pytest.mark.parametrize(
    ("platform", "kind", "tokens", "head_size", "expected"),
    [
        ("gpu", "any", 197, 128, "cudnn"),
        ("gpu", "any", 197, 136, None),
        ("gpu", "any", 197, 100, None),
        ("tpu", "TPU v5 lite", 4096, 64, "pallas"),
        ("tpu", "TPU v4", 4096, 64, None),
        ("tpu", "TPU v4", 196, 64, "pallas"),
        ("tpu", "TPU v5 lite", 16384, 64, None),
    ],
)
def test_a_kernel_fits_within_its_limits_only(
    platform: str, kind: str, tokens: int, head_size: int, expected: str | None
) -> None:
    fitting = kernels.fitting(
        platform=platform, kind=kind, dtype="bfloat16", tokens=tokens, heads=12, head_size=head_size, drops=False
    )
    assert fitting == expected

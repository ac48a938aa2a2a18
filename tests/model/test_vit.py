"""The full model against the reference in float64, on one device and on meshes.

All parameters are random, biases and scales too, so that a test fails if one of them is not used.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from jax.sharding import PartitionSpec
from products import equations, products
from reference import flattened
from tape import gradients, tanh, value

from vit_dist import ViT
from vit_dist.config import ConfigError
from vit_dist.mesh import layout
from vit_dist.mesh.topology import make_mesh
from vit_dist.model import vit

Settings = dict[str, Any]

TINY: Settings = {
    "width": 32, "depth": 2, "scan": True, "mlp": 64, "heads": 4, "image_size": 8, "patch_size": 4, "num_classes": 5
}  # fmt: skip
MODELS: dict[str, Settings] = {
    "as the d2l.ai lesson's": {
        "channels": 1, "qkv_bias": False, "projection_bias": False, "activation": "gelu_tanh",
    },
    "cls without a position, registers, pre-logits, oblong": {
        "image_size": (8, 12), "patch_size": (4, 2), "channels": 4, "registers": 2, "pre_logits": 24,
        "cls_position": False,
    },
    "mean, sincos2d, registers, LayerScale, QK-norm": {
        "pool": "mean", "position": "sincos2d", "registers": 3, "layer_scale": 0.1, "qk_norm": True, "patch_size": 2,
    },
    "map, swiglu, registers": {"pool": "map", "activation": "swiglu", "registers": 1},
    "parallel, as ViT-22B": {"parallel": True, "qk_norm": True, "qkv_bias": False},
    "as DINOv3: rope2d, registers, swiglu, epsilon, norm after the mean": {
        "position": "rope2d", "registers": 2, "activation": "swiglu", "norm_epsilon": 0.1, "layer_scale": 0.1,
        "pool": "mean", "pool_norm": "after", "class_token": True, "image_size": (8, 12), "qk_norm": True,
        "qk_norm_bias": True,
    },
    "as CLIP: norm before the blocks, quick GELU, output projection, no head": {
        "embedding_norm": "tokens", "activation": "quick_gelu", "output_projection": 12, "num_classes": 0,
        "pool_norm": "both",
    },
    "as AIMv2: RMSNorm, of the patches too, no positions": {
        "norm": "rmsnorm", "embedding_norm": "patches", "activation": "swiglu", "qkv_bias": False, "position": "none",
        "pool": "mean",
    },
    "class token and mean, none normalised": {
        "pool": "cls_mean", "pool_norm": "none", "registers": 1, "pre_logits": 12, "rope_base": 20.0,
        "position": "rope2d",
    },
    "map beside a class token, normalised after": {
        "pool": "map", "class_token": True, "pool_norm": "after",
    },
}  # fmt: skip
RANDOM: Settings = {"dropout": 0.1, "embedding_dropout": 0.1, "attention_dropout": 0.1, "drop_path": 0.3}
MESHES: list[dict[str, int]] = [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]

# Most of these tests' time is compilation, and none of their claims is about the quality of the compiled code.
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def abstract(**settings: Any) -> tuple[Any, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: ViT(**{**TINY, **settings}, rngs=nnx.Rngs(0))))


def filled(state: nnx.State) -> nnx.State:
    """Normal numbers of a deviation that keeps activations near one, scales around one."""
    numbers = np.random.default_rng(0)

    def fill(path: tuple, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        values = numbers.normal(size=leaf.shape) * 1.2 / math.sqrt(TINY["width"])
        return jnp.asarray(values + 1 if "scale" in name else values, jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, state)


def images(batch: int = 8, size: tuple[int, int] = (8, 8), channels: int = 3) -> Any:
    return np.random.default_rng(1).normal(size=(batch, *size, channels)).astype(np.float32)


def logits_of(graph: Any) -> Any:
    return lambda parameters, x, key=None: nnx.merge(graph, parameters)(x, key)


def scored(function: Any) -> Any:
    """Value and gradient of a score of the logits, and the logits."""

    def score(parameters: Any, *inputs: Any) -> tuple[jax.Array, jax.Array]:
        logits = function(parameters, *inputs)
        return jnp.mean(jnp.sum(jnp.tanh(logits) * jnp.arange(1, logits.shape[1] + 1), axis=1)), logits

    return jit(jax.value_and_grad(score, has_aux=True))


def expected_of(settings: Settings, parameters: Any, x: Any) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The reference's logits in float64, and the gradients of their score by path."""
    own = {path: value(leaf) for path, leaf in flattened(nnx.to_pure_dict(parameters)).items()}
    logits = reference.logits({**TINY, "activation": "gelu", **settings}, own, x)
    score = (tanh(logits) * np.arange(1, logits.shape[1] + 1)).sum() / len(x)
    return logits.data, dict(zip(own, gradients(score, list(own.values())), strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_agree_with_the_reference(name: str) -> None:
    settings = MODELS[name]
    graph, state = abstract(**settings)
    parameters = filled(state)
    size = settings.get("image_size", (8, 8))
    x = images(3, size, settings.get("channels", 3))
    (_, logits), gradient = scored(logits_of(graph))(parameters, x)
    expected, slopes = expected_of(settings, parameters, x)
    assert logits.dtype == jnp.float32 and logits.shape == (3, settings.get("num_classes", 5) or 12)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    gradients = flattened(nnx.to_pure_dict(gradient))
    assert gradients.keys() == slopes.keys()
    for path, slope in slopes.items():
        if not path.endswith("qkv/bias"):  # the keys' bias changes nothing: its gradient is rounding
            assert np.abs(slope).max() > 1e-6, path
        np.testing.assert_allclose(gradients[path], slope, rtol=1e-4, atol=1e-5, err_msg=path)


def test_parameters_have_their_agreed_names() -> None:
    _, state = abstract(registers=1, layer_scale=0.1, activation="swiglu", pre_logits=8)
    modules = {"/".join(map(str, path[:-1])) or path[-1] for path, _ in nnx.to_flat_state(state)}
    assert modules == set(
        "patch cls position registers norm pre_logits head blocks/norm1 blocks/attention/qkv "
        "blocks/attention/projection blocks/norm2 blocks/mlp/up blocks/mlp/down blocks/mlp/gate blocks/scale1 "
        "blocks/scale2".split()
    )
    _, state = abstract(pool="map")
    assert {path[1] for path, _ in nnx.to_flat_state(state) if path[0] == "pool"} == set(
        "probe query key_value projection norm mlp".split()
    )


def test_a_new_model_starts_as_in_the_papers() -> None:
    settings = {**TINY, "width": 128, "registers": 64, "head_bias": -6.9, "position_std": 0.01}
    graph, _ = abstract(**settings)
    model = nnx.merge(graph, jit(lambda: nnx.state(ViT(**settings, rngs=nnx.Rngs(0))))())
    assert not np.any(model.cls[...])
    assert np.std(model.position[...]) == pytest.approx(0.01, rel=0.1)
    assert np.std(model.registers[...]) == pytest.approx(0.02, rel=0.05)
    assert not np.any(model.head.kernel[...])
    np.testing.assert_array_equal(model.head.bias[...], np.full(5, -6.9, np.float32))
    qkv = np.asarray(model.blocks.attention.qkv.kernel[...])
    assert qkv.shape == (2, 128, 3, 4, 32)
    # Each block has a key of its own.
    assert np.corrcoef(qkv[0].ravel(), qkv[1].ravel())[0, 1] == pytest.approx(0, abs=0.02)
    np.testing.assert_allclose(qkv.var((1, 3, 4)), np.full((2, 3), 2 / 256), rtol=0.03)
    assert not np.any(model.blocks.attention.qkv.bias[...])


def test_a_class_token_without_a_position_starts_random() -> None:
    model = ViT(**{**TINY, "width": 128, "depth": 1, "cls_position": False, "position_std": 0.01}, rngs=nnx.Rngs(0))
    assert np.std(model.cls[...]) == pytest.approx(0.01, rel=0.2)


@functools.cache
def noisy(**settings: Any) -> Any:
    """Score, logits and gradients, with blocks stacked, of a model with every randomness on."""
    graph, state = abstract(**RANDOM, layer_scale=0.5, **settings)
    stacked = filled(abstract(**RANDOM, layer_scale=0.5)[1])
    if settings.get("scan", True):
        return scored(logits_of(graph))(stacked, images(), jax.random.key(0))
    values, gradients = scored(logits_of(graph))(_unstacked(state, stacked), images(), jax.random.key(0))
    return values, _stacked(gradients, stacked)


def _unstacked(state: nnx.State, stacked: nnx.State) -> nnx.State:
    tree = nnx.to_pure_dict(stacked)
    tree["blocks"] = {i: jax.tree.map(lambda leaf, i=i: leaf[i], tree["blocks"]) for i in range(TINY["depth"])}
    nnx.replace_by_pure_dict(state, tree)
    return state


def _stacked(gradients: nnx.State, stacked: nnx.State) -> nnx.State:
    tree = nnx.to_pure_dict(gradients)
    tree["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tree["blocks"].values())
    nnx.replace_by_pure_dict(stacked, tree)
    return stacked


@pytest.mark.parametrize(
    "settings",
    [{"scan": False}, {"remat": "names"}, {"remat": "block", "scan": False}],
    ids=str,
)
def test_unrolling_and_remat_change_neither_values_nor_gradients(settings: Settings) -> None:
    for leaf, wanted in zip(jax.tree.leaves(noisy(**settings)), jax.tree.leaves(noisy()), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"layer_scale": 0.1, **RANDOM}, {"activation": "swiglu", "qk_norm": True}, {"parallel": True}],
    ids=str,
)
def test_remat_names_recomputes_no_dense_product_except_the_attention_scores(settings: Settings) -> None:
    def count(remat: str, scan: bool = True) -> int:
        graph, state = abstract(**settings, remat=remat, scan=scan)
        function = logits_of(graph)
        gradient = jax.grad(lambda parameters, x, key: jnp.sum(function(parameters, x, key)))
        return products(gradient, state, jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32), jax.random.key(0))[0]

    depth = TINY["depth"]
    assert count("names") == count("names", scan=False) == count("none") + depth
    assert count("block") >= count("none") + 4 * depth  # qkv, scores, the values they weigh, up, and more


def test_stacked_blocks_start_like_separate_blocks() -> None:
    stacked, separate = (
        nnx.to_pure_dict(nnx.state(jit(lambda scan=scan: ViT(**{**TINY, "scan": scan}, rngs=nnx.Rngs(3)))()))
        for scan in (True, False)
    )
    for number in range(TINY["depth"]):
        own = jax.tree.map(lambda leaf, number=number: leaf[number], stacked["blocks"])
        jax.tree.map(np.testing.assert_array_equal, own, separate["blocks"][number])


@pytest.mark.parametrize("scan", [True, False])
def test_unrolled_remat_blocks_prevent_common_subexpression_elimination(scan: bool) -> None:
    graph, state = abstract(remat="block", scan=scan)
    jaxpr = jax.make_jaxpr(logits_of(graph))(state, images(1))
    guards = {e.params["prevent_cse"] for e, _ in equations(jaxpr.jaxpr) if "prevent_cse" in e.params}
    assert guards == {not scan}


def test_bfloat16_keeps_parameters_and_logits_in_float32_and_is_close() -> None:
    graph, state = abstract()
    parameters = filled(state)
    (_, exact), exact_gradient = scored(logits_of(graph))(parameters, images())
    graph, _ = abstract(dtype="bfloat16")
    (_, logits), gradient = scored(logits_of(graph))(parameters, images())
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract(dtype="bfloat16")[1])} == {jnp.dtype("float32")}
    assert 0 < np.abs(logits - exact).max() < 0.03 * np.abs(exact).max()
    for leaf, exact_leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(exact_gradient), strict=True):
        assert leaf.dtype == jnp.float32
        assert np.linalg.norm(leaf - exact_leaf) < 0.05 * np.linalg.norm(exact_leaf) + 1e-5


def test_forward_mode_is_refused_by_name() -> None:
    graph, state = abstract()
    parameters = filled(state)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda parameters: jnp.sum(logits_of(graph)(parameters, images())), (parameters,), (parameters,))


def test_randomness_needs_a_key_and_follows_it() -> None:
    graph, state = abstract(**RANDOM)
    parameters = filled(state)
    run = jit(logits_of(graph))
    plain, _ = abstract()
    without = run(parameters, images())
    np.testing.assert_allclose(without, jit(logits_of(plain))(parameters, images()), rtol=1e-6, atol=1e-6)
    first, again, other = (run(parameters, images(), jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).min(axis=1).max() > 1e-3 and np.abs(first - without).max() > 1e-2


@pytest.mark.parametrize(
    ("schedule", "rates"), [("linear", [0.0, 0.2, 0.4, 0.6]), ("constant", [0.3, 0.3, 0.3, 0.3])], ids=str
)
def test_drop_path_follows_its_schedule_and_every_branch_of_every_block_draws_separately(
    schedule: str, rates: list[float]
) -> None:
    # Every branch adds 1 to a channel of its own: a channel without it shows that the branch was dropped.
    depth, batch = 4, 4000
    graph, state = abstract(depth=depth, drop_path=rates[-1], drop_path_schedule=schedule)
    parameters = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), state)
    blocks = parameters["blocks"]
    blocks["attention"]["projection"]["bias"][...] = jnp.eye(depth, 32)
    blocks["mlp"]["down"]["bias"][...] = jnp.eye(depth, 32, depth)
    encode = jit(lambda parameters, x, key: nnx.merge(graph, parameters).encode(x, key))
    y = np.asarray(encode(parameters, jnp.zeros((batch, 2, 32)), jax.random.key(0)))
    np.testing.assert_array_equal(y[:, 0], y[:, 1])  # whole examples
    branches = y[:, 0, : 2 * depth]
    kept = branches > 0
    for i, rate in enumerate(2 * rates):
        np.testing.assert_allclose(branches[kept[:, i], i], 1 / (1 - rate), rtol=1e-5)
        assert (~kept[:, i]).mean() == pytest.approx(rate, abs=0.04)
    random = [i for i, rate in enumerate(2 * rates) if rate]
    correlation = np.corrcoef(kept[:, random].T) - np.eye(len(random))
    assert np.abs(correlation).max() < 5 / math.sqrt(batch)


def test_parameters_and_random_logits_are_the_same_on_every_mesh() -> None:
    settings = {**TINY, **RANDOM, "layer_scale": 0.5, "registers": 1, "head_zero_init": False}

    def initialise() -> nnx.State:
        return nnx.state(ViT(**settings, rngs=nnx.Rngs(0)))

    graph, _ = nnx.split(nnx.eval_shape(lambda: ViT(**settings, rngs=nnx.Rngs(0))))
    fresh = jit(initialise)()
    expected = jit(logits_of(graph))(fresh, images(), jax.random.key(0))
    for sizes in MESHES:
        with jax.set_mesh(make_mesh(sizes, jax.devices())):
            own = jit(initialise)()
            x = jax.device_put(images(), layout.spec("batch", None, None, None))
            logits = jit(logits_of(graph))(own, x, jax.random.key(0))
            assert jax.typeof(logits).sharding.spec == layout.spec("batch", None)
        for leaf, wanted in zip(jax.tree.leaves(own), jax.tree.leaves(fresh), strict=True):
            np.testing.assert_array_equal(leaf, wanted, err_msg=str(sizes))
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5, err_msg=str(sizes))
    kernel = own["blocks"]["mlp"]["up"]["kernel"][...]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 16, 32)}  # of (2, 32, 64)


NEW_ON_A_MESH: dict[str, Settings] = {
    "rope2d, norm of tokens, class token and mean": {
        "position": "rope2d", "rope_jitter": 1.2, "rope_rescale": 2.0, "qk_norm": True, "qk_norm_bias": True,
        "embedding_norm": "tokens", "pool": "cls_mean", "pool_norm": "both", "registers": 2, "activation": "quick_gelu",
    },
    "rmsnorm, norm of patches, after the mean": {
        "norm": "rmsnorm", "embedding_norm": "patches", "position": "none", "pool": "mean", "pool_norm": "after",
        "class_token": True, "output_projection": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", NEW_ON_A_MESH)
def test_logits_and_gradients_of_split_tokens_heads_and_parameters_are_those_of_one_device(name: str) -> None:
    graph, state = abstract(**NEW_ON_A_MESH[name])
    parameters, key = filled(state), jax.random.key(0)
    (_, expected), expected_gradient = scored(logits_of(graph))(parameters, images(), key)
    for sizes in ({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "context": 2}):
        with jax.set_mesh(make_mesh(sizes, jax.devices())):
            _, split = abstract(**NEW_ON_A_MESH[name])
            own = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding.spec), parameters, split)
            x = jax.device_put(images(), layout.spec("batch", None, None, None))
            (_, logits), gradient = scored(logits_of(graph))(own, x, key)
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5, err_msg=str(sizes))
        for leaf, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
            np.testing.assert_allclose(leaf, wanted, rtol=1e-4, atol=1e-5, err_msg=str(sizes))


def test_rope2d_is_jittered_in_training_alone() -> None:
    settings: Settings = {"position": "rope2d", "pool": "mean"}
    graph, state = abstract(**settings)
    jittered, _ = abstract(**settings, rope_jitter=1.5, rope_rescale=2.0)
    parameters = filled(state)
    plain, evaluated = (jit(logits_of(one))(parameters, images()) for one in (graph, jittered))
    np.testing.assert_array_equal(plain, evaluated)
    run = jit(logits_of(jittered))
    first, again, other = (run(parameters, images(), jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - plain).max() > 1e-3 and np.abs(first - other).max() > 1e-3


def test_rope2d_takes_images_of_another_size_with_the_same_parameters() -> None:
    settings: Settings = {"position": "rope2d", "pool": "mean"}
    shapes = [jax.tree.map(jnp.shape, abstract(**settings, image_size=size)[1]) for size in (8, (12, 16))]
    assert shapes[0] == shapes[1]


LAYOUT = {  # on data=2 x fsdp=2 x tensor=2; blocks are stacked, and their first dimension is not split
    "patch/kernel": (None, "fsdp"),
    "patch/bias": ("fsdp",),
    "cls": ("fsdp",),
    "position": (None, "fsdp"),
    "registers": (None, "fsdp"),
    "blocks/norm1/scale": (None, "fsdp"),
    "blocks/norm1/bias": (None, "fsdp"),
    "blocks/attention/qkv/kernel": (None, "fsdp", None, "tensor", None),
    "blocks/attention/qkv/bias": (None, None, "tensor", None),
    "blocks/attention/query_norm/scale": (None, None),
    "blocks/attention/query_norm/bias": (None, None),
    "blocks/attention/key_norm/scale": (None, None),
    "blocks/attention/key_norm/bias": (None, None),
    "blocks/attention/projection/kernel": (None, "tensor", None, "fsdp"),
    "blocks/attention/projection/bias": (None, "fsdp"),
    "blocks/norm2/scale": (None, "fsdp"),
    "blocks/norm2/bias": (None, "fsdp"),
    "blocks/mlp/up/kernel": (None, "fsdp", "tensor"),
    "blocks/mlp/up/bias": (None, "tensor"),
    "blocks/mlp/gate/kernel": (None, "fsdp", "tensor"),
    "blocks/mlp/gate/bias": (None, "tensor"),
    "blocks/mlp/down/kernel": (None, "tensor", "fsdp"),
    "blocks/mlp/down/bias": (None, "fsdp"),
    "blocks/scale1/scale": (None, "fsdp"),
    "blocks/scale2/scale": (None, "fsdp"),
    "norm/scale": ("fsdp",),
    "norm/bias": ("fsdp",),
    "embedding_norm/scale": ("fsdp",),
    "embedding_norm/bias": ("fsdp",),
    "pooled_norm/scale": ("fsdp",),
    "pooled_norm/bias": ("fsdp",),
    "output_projection/kernel": ("fsdp", None),
    "pre_logits/kernel": (None, None),
    "pre_logits/bias": (None,),
    "head/kernel": (None, None),
    "head/bias": (None,),
}
POOL_LAYOUT = {
    "pool/probe": (None, "fsdp"),
    "pool/query/kernel": ("fsdp", "tensor", None),
    "pool/query/bias": ("tensor", None),
    "pool/key_value/kernel": ("fsdp", None, "tensor", None),
    "pool/key_value/bias": (None, "tensor", None),
    "pool/projection/kernel": ("tensor", None, "fsdp"),
    "pool/projection/bias": ("fsdp",),
    "pool/norm/scale": ("fsdp",),
    "pool/norm/bias": ("fsdp",),
    "pool/mlp/up/kernel": ("fsdp", "tensor"),
    "pool/mlp/up/bias": ("tensor",),
    "pool/mlp/down/kernel": ("tensor", "fsdp"),
    "pool/mlp/down/bias": ("fsdp",),
    "head/kernel": ("fsdp", None),
}


def specs(**settings: Any) -> dict[str, PartitionSpec]:
    with jax.set_mesh(make_mesh(MESHES[-1], jax.devices())):
        _, state = abstract(**settings)
        return {"/".join(map(str, p)): leaf.get_value().sharding.spec for p, leaf in nnx.to_flat_state(state)}


def test_every_parameter_is_split_as_the_table_says() -> None:
    norms: Settings = {"qk_norm": True, "qk_norm_bias": True, "pool_norm": "both", "embedding_norm": "tokens"}
    ends: Settings = {"output_projection": 8, "pre_logits": 8}
    split = specs(registers=1, layer_scale=0.1, activation="swiglu", **norms, **ends)
    assert split == {name: PartitionSpec(*axes) for name, axes in LAYOUT.items()}
    split = specs(pool="map")
    assert {name: PartitionSpec(*axes) for name, axes in POOL_LAYOUT.items()}.items() <= split.items()
    assert {name for name in split if name.startswith("pool")} == set(POOL_LAYOUT) - {"head/kernel"}


def test_a_model_runs_without_any_setup() -> None:
    model = ViT("S/16", image_size=32, patch_size=4, num_classes=10, rngs=nnx.Rngs(0))
    logits = model(images(2, (32, 32)))
    assert logits.shape == (2, 10) and logits.dtype == jnp.float32
    assert not np.any(logits)  # the head starts at zero
    assert vit.parameter_count(model) == 22_050_664 - (16**2 - 4**2) * 3 * 384 - (197 - 65) * 384 - 990 * 385


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 30, "patch_size": 8}, "model.image_size: height 30 is not a multiple of the patch's 8"),
        ({"image_size": (8, 10)}, "model.image_size: width 10 is not a multiple of the patch's 4; take 8 or 12"),
        ({"heads": 5}, "model.width: 32 does not divide by 5 heads; take 30 or 35"),
        (
            {"heads": 16, "position": "rope2d"},
            "model.heads: 16 of 2 channels each, which must divide by 4 for model.pos",
        ),
        ({"class_token": False}, "model.class_token: false, but model.pool=cls takes it; set pool=mean or map"),
        ({"rope_jitter": 0.5}, "model.rope_jitter: must be at least 1, found 0.5"),
        ({"width": 6, "heads": 2, "position": "sincos2d"}, "model.width: 6 must divide by 4"),
        ({"width": None}, "model.width: not set; set it, or model.variant to a name such as B/16"),
        ({"patch_size": None}, "model.patch_size: not set"),
        ({"num_classes": None}, "model.num_classes: not set"),
        ({"patchsize": 4}, r"unknown key model.patchsize \(did you mean model.patch_size\?\)"),
        ({"pool": "gap"}, "model.pool: 'gap' is none of cls, mean, cls_mean, map"),
        ({"dropout": 1.0}, r"model.dropout: must be in \[0, 1\), found 1.0"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_by_name(settings: Settings, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        abstract(**settings)


@pytest.mark.parametrize(
    "x", [np.zeros((1, 8, 12, 3), np.float32), np.zeros((1, 8, 8, 1), np.float32), np.zeros((1, 8, 8, 3), np.uint8)]
)
def test_images_of_another_size_or_kind_are_refused(x: Any) -> None:
    graph, state = abstract()
    with pytest.raises(ConfigError, match=r"images: expected \[B, 8, 8, 3\] of normalised floats, found \[1, 8"):
        jax.eval_shape(logits_of(graph), state, x)

"""Tokens split over devices: attention alone, the full model, and the cost of both in the compiled program."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives import distance
from flax import nnx
from products import equations
from system import NO_AUGMENTATION, NO_DROPOUT, settings

from vit_dist import ViT
from vit_dist.config import ConfigError
from vit_dist.mesh import layout
from vit_dist.mesh.feed import batch_sharding
from vit_dist.mesh.topology import make_mesh
from vit_dist.model import context
from vit_dist.model.attention import attend, attend_split
from vit_dist.model.layers import dropout
from vit_dist.plan.collectives import collectives
from vit_dist.program import Program

KINDS = ("ring", "all_to_all")
HEADS = ("batch", "tokens", "heads", None)
TINY: dict[str, Any] = {
    "width": 32, "depth": 2, "scan": True, "mlp": 64, "heads": 4, "image_size": 8, "patch_size": 4, "num_classes": 5
}  # fmt: skip
RANDOM: dict[str, Any] = {"dropout": 0.1, "embedding_dropout": 0.1, "drop_path": 0.3}
POOLS: dict[str, dict[str, Any]] = {  # each with an odd number of tokens
    "cls": {"pool": "cls", "layer_scale": 0.5},
    "map": {"pool": "map", "registers": 3, "qk_norm": True},
    "mean": {"pool": "mean", "registers": 1, "position": "sincos2d", "patch_size": 2},
}


def on(**sizes: int) -> Any:
    """A context in which a mesh of fake devices is in use."""
    return jax.set_mesh(make_mesh(sizes, jax.devices()))


@functools.cache
def arrays(tokens: int) -> tuple[np.ndarray, ...]:
    """Queries, keys, values [1, N, 8, 4], and the weights of the score of their attention."""
    numbers = np.random.default_rng(tokens)
    return tuple(numbers.normal(size=(1, tokens, 8, 4)).astype(np.float32) for _ in range(4))


def scored(function: Any) -> Any:
    """The attention and the gradients of its sum, weighted by the last argument."""

    def score(q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = function(q, k, v)
        return jnp.sum(y * weights), y

    # These run longer unoptimised than they take to compile with optimisation.
    careful = {"xla_backend_optimization_level": 3}
    return jax.jit(jax.value_and_grad(score, argnums=(0, 1, 2), has_aux=True), compiler_options=careful)


@functools.cache
def expected(tokens: int) -> list[np.ndarray]:
    """The value and three gradients of plain attention on one device, head by head to save memory."""
    full = scored(lambda q, k, v: attend(q, k, v, "xla"))
    heads = [full(*(array[:, :, h : h + 1] for array in arrays(tokens))) for h in range(8)]
    by_head = [(np.asarray(y), *map(np.asarray, gradients)) for (_, y), gradients in heads]
    return [np.concatenate(arrays, axis=2) for arrays in zip(*by_head)]


def on_mesh(tokens: int, kind: str, dtype: Any = jnp.float32, **sizes: int) -> list[np.ndarray]:
    """The same on a mesh, on padded arrays whose padding is arbitrary; padding is cut off again."""
    with on(**sizes):
        padding = context.padded_length(tokens, layout.shard_count("tokens")) - tokens
        padded = [np.pad(array, ((0, 0), (0, padding), (0, 0), (0, 0)), constant_values=3) for array in arrays(tokens)]
        padded[3][:, tokens:] = 0  # the output for padding does not count
        split = [jax.device_put(array.astype(dtype), layout.spec(*HEADS)) for array in padded]
        function = scored(lambda q, k, v: attend_split(q, k, v, tokens, kind, "auto", 0.0))
        (_, y), gradients = function(*split)
        results = (y, *gradients)
        assert all(jax.typeof(array).sharding.spec == layout.spec(*HEADS) for array in results)
    return [np.asarray(array, np.float32)[:, :tokens] for array in results]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "devices"),
    [
        *((197, 2), (197, 4), (197, 8)),
        (1024, 4),  # without padding
        (4099, 4),  # in chunks
        *(pytest.param(tokens, devices, marks=pytest.mark.slow) for tokens in (1024, 4099) for devices in (2, 8)),
    ],
)
def test_attention_over_split_tokens_is_full_attention_in_value_and_gradient(
    tokens: int, devices: int, kind: str, record_property: Any
) -> None:
    results = on_mesh(tokens, kind, context=devices)
    difference = max(np.abs(result - wanted).max() for result, wanted in zip(results, expected(tokens)))
    record_property("largest_difference", float(difference))
    assert all(np.abs(wanted).max() > 0.5 for wanted in expected(tokens))
    assert difference < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [3, 17])
def test_devices_that_hold_only_padding_change_nothing(tokens: int, kind: str) -> None:
    for result, wanted in zip(on_mesh(tokens, kind, context=8), expected(tokens)):
        np.testing.assert_allclose(result, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_heads_are_split_at_once(kind: str) -> None:
    for result, wanted in zip(on_mesh(197, kind, context=2, tensor=4), expected(197)):
        np.testing.assert_allclose(result, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_near_float32(kind: str) -> None:
    for result, wanted in zip(on_mesh(197, kind, jnp.bfloat16, context=4), expected(197)):
        assert 0 < np.linalg.norm(result - wanted) < 0.01 * np.linalg.norm(wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_bfloat16_is_at_most_half_larger_than_that_of_jaxs_own_attention(kind: str) -> None:
    rounded = [jnp.asarray(array, jnp.bfloat16) for array in arrays(197)]
    exact = scored(lambda q, k, v: attend(q, k, v, "xla"))(*(array.astype(jnp.float32) for array in rounded))
    own = scored(functools.partial(jax.nn.dot_product_attention, implementation="xla"))(*rounded)
    found = on_mesh(197, kind, jnp.bfloat16, context=4)
    for one, other, true in zip(found, *((y, *gradients) for (_, y), gradients in (own, exact)), strict=True):
        assert distance(one, true) <= 1.5 * distance(other, true)


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_derivative_is_that_of_full_attention(kind: str) -> None:
    def along_values(function: Any, split: Any = None) -> list[np.ndarray]:
        """The product of the score's Hessian with v, q and k."""
        q, k, v, weights = (jax.device_put(array, split) for array in arrays(24))
        gradients = jax.grad(lambda *inputs: jnp.sum(function(*inputs) * weights), (0, 1, 2))
        return [np.asarray(one) for one in jax.jit(lambda *inputs: jax.vjp(gradients, *inputs)[1]((v, q, k)))(q, k, v)]

    with on(context=4):
        found = along_values(lambda q, k, v: attend_split(q, k, v, 24, kind, "auto", 0.0), layout.spec(*HEADS))
    for one, other in zip(found, along_values(lambda q, k, v: attend(q, k, v, "xla")), strict=True):
        assert distance(one, other) < 1e-6 * np.linalg.norm(other)


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_padding_is_short_and_gives_equal_shards_of_equal_chunks(shards: int) -> None:
    for tokens in (1, 5, 197, 1024, 1025, 4099, 16_384, 65_537):
        length = context.padded_length(tokens, shards)
        chunks = -(-length // (shards * context.CHUNK))
        assert length % (shards * chunks) == 0
        assert tokens <= length < tokens + shards * chunks


def test_dropout_masks_do_not_depend_on_the_padding() -> None:
    def mask(tokens: int) -> np.ndarray:
        x = jnp.ones((4, tokens, 6), out_sharding=layout.spec("batch", "tokens", None))
        return np.asarray(jax.jit(dropout, static_argnums=1)(x, 0.5, jax.random.key(1)))

    unpadded = mask(13)
    assert (unpadded == 0).any() and (unpadded[:, :5] != unpadded[:, 5:10]).any()
    for devices, length in ((2, 14), (4, 16), (8, 24)):
        with on(context=devices):
            np.testing.assert_array_equal(mask(length)[:, :13], unpadded)


def model(**keywords: Any) -> tuple[Any, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: ViT(**{**TINY, **keywords}, rngs=nnx.Rngs(0))))


def images() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(8, 8, 8, 3)).astype(np.float32)


def logits_and_gradients(kind: str = "ring", **keywords: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Those of random parameters on the mesh in use, with all randomness that a mesh with `context` allows."""
    graph, state = model(**RANDOM, **keywords, context_attention=kind)
    numbers = np.random.default_rng(0)

    def fill(leaf: Any) -> jax.Array:
        split = leaf.sharding.spec if leaf.sharding is not None and layout.shard_count("tokens") > 1 else None
        return jax.device_put(numbers.normal(size=leaf.shape).astype(np.float32) / 5, split)

    def score(parameters: nnx.State, x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = nnx.merge(graph, parameters)(x, key)
        return jnp.mean(jnp.sum(jnp.sin(logits) * jnp.arange(1, 6), axis=1)), logits

    x = jax.device_put(images(), layout.spec("batch", None, None, None))
    quick = {"xla_llvm_disable_expensive_passes": True}
    function = jax.jit(jax.value_and_grad(score, has_aux=True), compiler_options=quick)
    (_, logits), gradients = function(jax.tree.map(fill, state), x, jax.random.key(0))
    return np.asarray(logits), [np.asarray(leaf) for leaf in jax.tree.leaves(gradients)]


@functools.cache
def on_one_device(pool: str) -> tuple[np.ndarray, list[np.ndarray]]:
    return logits_and_gradients(**POOLS[pool])


@pytest.mark.parametrize(
    ("pool", "kind", "sizes"),
    [
        ("cls", "ring", {"context": 8}),
        ("cls", "all_to_all", {"fsdp": 2, "context": 4}),
        ("map", "ring", {"fsdp": 2, "context": 2, "tensor": 2}),
        ("map", "all_to_all", {"data": 2, "context": 2, "tensor": 2}),
        ("mean", "ring", {"fsdp": 2, "context": 4}),
    ],
    ids=str,
)
def test_a_model_with_split_tokens_agrees_with_one_device(pool: str, kind: str, sizes: dict[str, int]) -> None:
    logits, gradients = on_one_device(pool)
    with on(**sizes):
        split_logits, split_gradients = logits_and_gradients(kind, **POOLS[pool])
    assert np.abs(logits).max() > 0.1
    np.testing.assert_allclose(split_logits, logits, rtol=1e-5, atol=1e-5)
    for gradient, wanted in zip(split_gradients, gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_embedding_needs_no_communication_and_pooling_one_sum() -> None:
    sizes = {"context": 8}
    with on(**sizes):
        graph, state = model(depth=1)
        x = jax.device_put(images(), layout.spec("batch", None, None, None))
        text = jax.jit(lambda p, x: nnx.merge(graph, p)(x)).lower(state, x).compile().as_text()
    ops = [op for op in collectives(text, sizes) if op.kind != "collective-permute"]
    assert [(op.kind, op.axes, op.bytes) for op in ops] == [("all-reduce", ("context",), 8 * 32 * 4)]


def sends_and_exponentials(remat: str, scan: bool) -> tuple[int, int]:
    """How often an array is sent round the ring, and how many exponentials there are, in a gradient's jaxpr."""
    with on(context=4):
        graph, state = model(remat=remat, scan=scan)
        x = jax.ShapeDtypeStruct((8, 8, 8, 3), jnp.float32, sharding=batch_sharding(jax.sharding.get_mesh()))
        gradient = jax.grad(lambda p, x: jnp.sum(nnx.merge(graph, p)(x)))
        counts = collections.Counter()
        for equation, executions in equations(jax.make_jaxpr(gradient)(state, x).jaxpr):
            counts[equation.primitive.name] += executions * len(equation.outvars)
    return counts["ppermute"], counts["exp"]


@pytest.mark.parametrize("scan", [True, False])
def test_remat_names_does_not_repeat_the_ring(scan: bool) -> None:
    depth, steps = TINY["depth"], 3
    # Forward: keys and values. Backward: these again, and both gradients, which are sent two times more.
    sends = depth * (2 * steps + 2 * steps + 2 * (steps + 2))
    assert sends_and_exponentials("none", scan)[0] == sends_and_exponentials("names", scan)[0] == sends
    assert sends_and_exponentials("names", scan)[1] == sends_and_exponentials("none", scan)[1]
    assert sends_and_exponentials("block", scan)[0] == sends + depth * 2 * steps


def compiled_step(sizes: dict[str, int], *overrides: str) -> Any:
    axes = (f"mesh.{axis}={size}" for axis, size in {"data": 1, **sizes}.items())
    configured = settings(*axes, *overrides, *NO_DROPOUT, *NO_AUGMENTATION)
    program = Program(configured, classes=10, steps=20, augment_on_device=True)
    with program.in_use():
        rows, sharding = configured.batch_size, batch_sharding(program.mesh)
        shapes = {"image": ((rows, 8, 8, 1), jnp.uint8), "label": ((rows,), jnp.int32), "id": ((rows,), jnp.int32)}
        batch = {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}
        return program.train_step.lower(program.abstract_state(), batch).compile()


@pytest.mark.parametrize(("kind", "collective"), [("ring", "collective-permute"), ("all_to_all", "all-to-all")])
def test_tokens_move_along_context_only_and_nothing_crosses_data_between_micro_batches(
    kind: str, collective: str
) -> None:
    sizes = {"data": 2, "context": 4}
    overrides = ("accumulate_steps=4", f"model.context_attention={kind}", "model.registers=1")
    ops = collectives(compiled_step(sizes, *overrides).as_text(), sizes)
    assert {op.axes for op in ops if op.kind == collective} == {("context",)}
    assert {op.loops for op in ops if "data" in op.axes} == {0}
    gathered = [op.bytes for op in ops if op.kind == "all-gather" and "context" in op.axes]
    assert max(gathered) == 8 * 32 * 4  # the position embeddings' gradient, [8, 32]; no activations


@functools.cache
def temporary_bytes(devices: int, *overrides: str) -> int:
    """The temporary memory of each device in a step on one image of 16,384 tokens."""
    step = compiled_step({"context": devices}, "batch_size=1", "model.image_size=512", "model.depth=1", *overrides)
    return step.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_need_less_than_a_third_of_one_devices_memory_for_16384_tokens(
    kind: str, record_property: Any
) -> None:
    on_one, on_eight = temporary_bytes(1), temporary_bytes(8, f"model.context_attention={kind}")
    record_property("temporary_bytes", (on_one, on_eight))
    assert 0 < on_eight < on_one / 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("mesh.context=4",), "model.attention_dropout: must be 0 with mesh.context=4, .* found 0.1; take 0 or"),
        (
            ("mesh.context=4", "mesh.tensor=2", "model.heads=4", "model.context_attention=all_to_all", *NO_DROPOUT),
            "model.heads: 4 does not divide over mesh.tensor=2 x mesh.context=4; take 8",
        ),
    ],
)  # fmt: skip
def test_a_model_whose_tokens_cannot_be_split_is_refused_before_compilation(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Program(settings("mesh.data=1", *overrides), classes=10, steps=1, augment_on_device=True)


@pytest.mark.parametrize(
    ("kind", "implementation", "rate", "message"),
    [
        ("ring", "xla", 0.1, "model.attention_dropout: must be 0 with mesh.context=8"),
        ("ring", "cudnn", 0.0, "model.attention: cudnn has no ring attention; .* model.context_attention=all_to_all"),
        ("all_to_all", "cudnn", 0.0, "model.attention: cudnn needs an NVIDIA GPU"),
    ],
)
def test_an_attention_that_does_not_support_split_tokens_is_refused(
    kind: str, implementation: str, rate: float, message: str
) -> None:
    with on(context=8), pytest.raises(ConfigError, match=message):
        x = jax.ShapeDtypeStruct(
            (1, 8, 8, 4), jnp.float32, sharding=jax.NamedSharding(jax.sharding.get_mesh(), layout.spec(*HEADS))
        )
        jax.eval_shape(lambda x: attend_split(x, x, x, 8, kind, implementation, rate), x)

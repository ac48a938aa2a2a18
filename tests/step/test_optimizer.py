"""The optimizers against plain optax, on one device and split over a mesh; rules, weight decay and schedules."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from reference import nested

from vit_dist.config import ConfigError, Optimizer, Rule
from vit_dist.step.muon import RMS
from vit_dist.step.optimizer import DIRECTIONS, layers_after, make_optimizer, parameter_paths
from vit_dist.step.schedule import make_schedule
from vit_dist.step.trained import parted, rejoined

DEPTH, WIDTH, HEADS, SIZE, MLP, CLASSES = 4, 32, 2, 32, 64, 10
SHAPES: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]] = {
    "blocks/attention/projection/kernel": ((DEPTH, HEADS, SIZE, WIDTH), (None, "tensor", None, "fsdp")),
    "blocks/attention/qkv/bias": ((DEPTH, 3, HEADS, SIZE), (None, None, "tensor", None)),
    "blocks/attention/qkv/kernel": ((DEPTH, WIDTH, 3, HEADS, SIZE), (None, "fsdp", None, "tensor", None)),
    "blocks/mlp/up/bias": ((DEPTH, MLP), (None, "tensor")),
    "blocks/mlp/up/kernel": ((DEPTH, WIDTH, MLP), (None, "fsdp", "tensor")),
    "blocks/norm1/scale": ((DEPTH, WIDTH), (None, "fsdp")),
    "cls": ((WIDTH,), ("fsdp",)),
    "head/bias": ((CLASSES,), (None,)),
    "head/kernel": ((WIDTH, CLASSES), ("fsdp", None)),
    "patch/kernel": ((48, WIDTH), (None, "fsdp")),
    "position": ((17, WIDTH), (None, "fsdp")),
}
PLAIN = Optimizer(name="sgd", learning_rate=0.1, momentum=0.0, schedule="constant")
Flat = dict[str, np.ndarray]


def numbers(seed: int) -> Flat:
    rng = np.random.default_rng(seed)
    return {path: rng.normal(size=shape).astype(np.float32) for path, (shape, _) in SHAPES.items()}


def flattened(tree: Any) -> Flat:
    paths, values = jax.tree.leaves(parameter_paths(tree)), jax.tree.leaves(tree)
    return {path: np.asarray(value) for path, value in zip(paths, values, strict=True)}


def make_mesh(**sizes: int) -> Mesh:
    count = int(np.prod(list(sizes.values())))
    explicit = (AxisType.Explicit,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=explicit, devices=jax.devices()[:count])


def put(flat: Flat, mesh: Mesh) -> dict[str, Any]:
    def shard(path: str, value: np.ndarray) -> jax.Array:
        spec = PartitionSpec(*(axis if axis in mesh.axis_names else None for axis in SHAPES[path][1]))
        return jax.device_put(value, NamedSharding(mesh, spec))

    return nested({path: shard(path, value) for path, value in flat.items()})


def trained(settings: Optimizer, mesh: Mesh, steps: int = 3) -> tuple[Flat, Any]:
    """Parameters (flat) and optimizer state after a few steps under a mesh."""
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(settings, 10)
        params = put(numbers(0), mesh)
        state = optimizer.init(params)

        @jax.jit
        def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        for seed in range(1, steps + 1):
            params, state = step(params, state, put(numbers(seed), mesh))
        return flattened(params), state


def update(settings: Optimizer, gradients: Flat) -> Flat:
    """The first step's updates without a mesh, of a model of `DEPTH` blocks."""
    optimizer = make_optimizer(settings, 10, depth=DEPTH)
    params = nested(numbers(0))
    own, own_gradients = (parted(tree, settings.rules)[0] for tree in (params, nested(gradients)))
    return flattened(jax.jit(optimizer.update)(own_gradients, optimizer.init(params), own)[0])


REFERENCES = {
    "sgd": lambda decay: optax.chain(optax.trace(0.9), decay, optax.scale(-0.1)),
    "adamw": lambda decay: optax.chain(optax.scale_by_adam(0.9, 0.99), decay, optax.scale(-0.1)),
    "lion": lambda decay: optax.chain(optax.scale_by_lion(0.9, 0.99), decay, optax.scale(-0.1)),
    "lamb": lambda decay: optax.chain(
        optax.scale_by_adam(0.9, 0.99), decay, optax.masked(optax.scale_by_trust_ratio(), kernels), optax.scale(-0.1)
    ),
    "adafactor": lambda decay: optax.chain(
        optax.adafactor(None, 32, multiply_by_parameter_scale=False, clipping_threshold=None, momentum=0.9),
        optax.scale(-1),
        decay,
        optax.scale(-0.1),
    ),
}


def kernels(flat: dict[str, Any]) -> dict[str, bool]:
    return {path: "kernel" in path for path in flat}


@functools.cache
def on_eight(name: str) -> tuple[Flat, Any]:
    """Parameters and state after three steps of an optimizer, everything split over eight devices."""
    decay = 0.0 if name == "muon" else 0.2  # optax's Muon has no mask for the half that Adam updates
    settings = Optimizer(name=name, learning_rate=0.1, weight_decay=decay, b2=0.99, schedule="constant")
    return trained(settings, make_mesh(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize("name", REFERENCES)
def test_stacked_blocks_on_a_mesh_are_updated_like_separate_blocks_by_plain_optax(name: str) -> None:
    def unstacked(flat: Flat) -> Flat:
        blocks = {f"{path} {i}": block for path in flat if "blocks/" in path for i, block in enumerate(flat[path])}
        return blocks | {path: value for path, value in flat.items() if "blocks/" not in path}

    ours, _ = on_eight(name)
    reference = REFERENCES[name](optax.add_decayed_weights(0.2, kernels))
    params = unstacked(numbers(0))
    state, step = reference.init(params), jax.jit(reference.update)
    for seed in (1, 2, 3):
        updates, state = step(unstacked(numbers(seed)), state, params)
        params = optax.apply_updates(params, updates)
    for path, value in unstacked(ours).items():
        np.testing.assert_allclose(value, params[path], rtol=3e-6, atol=3e-6, err_msg=path)


def test_muon_updates_the_matrices_of_the_blocks_like_plain_optax_and_the_rest_like_adam() -> None:
    def matrices(flat: Flat) -> Flat:
        result: Flat = {}
        for path, value in flat.items():
            if path.startswith("blocks/") and path.endswith("kernel"):
                for i in (0, DEPTH - 1):
                    block = value[i]
                    if "qkv" in path:
                        result |= {f"{path} {i} {j}": block[:, j].reshape(WIDTH, HEADS * SIZE) for j in range(3)}
                    else:
                        result[f"{path} {i}"] = block.reshape(-1, block.shape[-1])
            else:
                result[path] = value
        return result

    ours, _ = on_eight("muon")
    params = matrices(numbers(0))
    two_dimensional = {
        path: optax.contrib.MuonDimensionNumbers() if path.startswith("blocks/") and "kernel" in path else None
        for path in params
    }
    reference = optax.contrib.muon(
        0.1,
        beta=0.9,
        adam_b2=0.99,
        nesterov=False,
        consistent_rms=RMS,
        muon_weight_dimension_numbers=two_dimensional,
    )
    state, step = reference.init(params), jax.jit(reference.update)
    for seed in (1, 2, 3):
        updates, state = step(matrices(numbers(seed)), state, params)
        params = optax.apply_updates(params, updates)
    for path, value in matrices(ours).items():
        np.testing.assert_allclose(value, params[path], rtol=2e-5, atol=2e-5, err_msg=path)


@pytest.mark.parametrize("name", [*REFERENCES, "muon"])
def test_the_state_is_split_like_the_parameters_both_abstract_and_after_steps(name: str) -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    _, state = on_eight(name)
    with jax.set_mesh(mesh):
        params = put(numbers(0), mesh)
        abstract = jax.eval_shape(make_optimizer(Optimizer(name=name), 10).init, params)
    specs = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(params)}
    like_parameters = 0
    for before, after in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        if after.shape in specs:
            assert before.sharding.spec == after.sharding.spec == specs[after.shape]
            like_parameters += 1
        if after.size >= DEPTH * WIDTH * HEADS:
            assert any(axis is not None for axis in after.sharding.spec), after.shape
    assert like_parameters >= len(SHAPES)


@pytest.mark.parametrize("name", ["sgd", "muon"])  # the others' decay is part of their references above
def test_weight_decay_subtracts_rate_times_decay_times_the_parameter_from_kernels_only(name: str) -> None:
    settings = dataclasses.replace(PLAIN, name=name, warmup_steps=4)
    gradients = numbers(1)
    without, decayed = update(settings, gradients), update(dataclasses.replace(settings, weight_decay=0.3), gradients)
    for path in SHAPES:
        expected = -0.1 / 4 * 0.3 * numbers(0)[path] if path.endswith("kernel") else 0.0
        np.testing.assert_allclose(decayed[path] - without[path], expected, atol=1e-7, err_msg=path)


def test_the_first_rule_that_matches_sets_rate_and_decay() -> None:
    rules = (
        Rule("mlp/up", learning_rate=0.5),
        Rule("^blocks/", learning_rate=3.0, weight_decay=2.0),
        Rule("head", weight_decay=0.0),
    )
    zero = {path: np.zeros_like(value) for path, value in numbers(0).items()}
    decays = update(dataclasses.replace(PLAIN, weight_decay=0.2, rules=rules), zero)
    ones = {path: np.ones_like(value) for path, value in numbers(0).items()}
    moves = update(dataclasses.replace(PLAIN, rules=rules), ones)
    for path, rate, decay in (
        ("blocks/mlp/up/kernel", 0.5, 0.2),
        ("blocks/mlp/up/bias", 0.5, 0.0),
        ("blocks/norm1/scale", 3.0, 0.4),
        ("blocks/attention/qkv/kernel", 3.0, 0.4),
        ("head/kernel", 1.0, 0.0),
        ("patch/kernel", 1.0, 0.2),
        ("cls", 1.0, 0.0),
    ):
        np.testing.assert_allclose(moves[path], -0.1 * rate, rtol=1e-6)
        np.testing.assert_allclose(decays[path], -0.1 * rate * decay * numbers(0)[path], rtol=1e-5, atol=1e-8)


def test_frozen_parameters_have_no_state_and_no_update_and_do_not_count_in_the_clipped_norm() -> None:
    rules = (Rule("^(blocks|patch|position)", frozen=True),)
    settings = Optimizer(name="adamw", weight_decay=0.1, rules=rules)
    state = make_optimizer(settings, 10).init(nested(numbers(0)))
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.shape)
    assert moments == sorted(2 * [(WIDTH,), (CLASSES,), (WIDTH, CLASSES)])
    own, rest = parted(nested(numbers(0)), rules)
    assert sorted(flattened(own)) == ["cls", "head/bias", "head/kernel"]
    assert sorted(flattened(rejoined(own, rest))) == sorted(SHAPES)

    gradients = numbers(1)
    moved = update(dataclasses.replace(PLAIN, learning_rate=1.0, clip=0.5, rules=rules), gradients)
    free = list(flattened(own))
    norm = np.sqrt(sum(np.square(gradients[path]).sum() for path in free))
    assert sorted(moved) == sorted(free)
    for path in free:
        np.testing.assert_allclose(moved[path], -gradients[path] * 0.5 / norm, rtol=1e-5, err_msg=path)


def test_layer_decay_multiplies_the_rate_once_for_every_layer_that_follows() -> None:
    ones = {path: np.ones_like(value) for path, value in numbers(0).items()}
    rules = (Rule("mlp/up", learning_rate=2.0),)
    moved = update(dataclasses.replace(PLAIN, layer_decay=0.5, rules=rules), ones)
    for path in ("patch/kernel", "cls", "position"):
        np.testing.assert_allclose(moved[path], -0.1 * 0.5 ** (DEPTH + 1), rtol=1e-6)
    for path in ("head/kernel", "head/bias"):
        np.testing.assert_allclose(moved[path], -0.1, rtol=1e-6)
    for path, factor in (("blocks/norm1/scale", 1.0), ("blocks/mlp/up/kernel", 2.0)):
        for number in range(DEPTH):
            np.testing.assert_allclose(moved[path][number], -0.1 * factor * 0.5 ** (DEPTH - number), rtol=1e-6)


def test_layers_are_numbered_from_the_head_down_to_the_embedding() -> None:
    numbered = dict.fromkeys(("head/kernel", "norm/scale", "pool/probe", "pre_logits/kernel", "pooled_norm/scale"), 0)
    numbered |= {"blocks/11/mlp/up/kernel": 1, "blocks/0/mlp/up/lora/down/kernel": 12}
    numbered |= dict.fromkeys(("patch/kernel", "cls", "position", "registers", "embedding_norm/scale"), 13)
    assert {path: layers_after(path, 12) for path in numbered} == numbered


@pytest.mark.parametrize("name", DIRECTIONS)
def test_bfloat16_is_for_the_first_moment_only(name: str) -> None:
    def bytes_by_type(moment: str) -> dict[str, int]:
        settings = Optimizer(name=name, moment_dtype=moment)  # type: ignore[arg-type]
        state = jax.eval_shape(make_optimizer(settings, 10).init, nested(numbers(0)))
        totals = {"float32": 0, "bfloat16": 0}
        for leaf in jax.tree.leaves(state):
            if leaf.dtype.name in totals:
                totals[leaf.dtype.name] += leaf.size
        return totals

    parameters = sum(value.size for value in numbers(0).values())
    full, half = bytes_by_type("float32"), bytes_by_type("bfloat16")
    assert full["bfloat16"] == 0
    assert half["bfloat16"] == parameters
    assert half["float32"] == full["float32"] - parameters


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Optimizer(name="adamv"), r"optimizer.name: 'adamv' is none of sgd, .*did you mean adam"),
        (Optimizer(rules=(Rule("mlp"), Rule("mlq/up"))), r"optimizer.rules\[1\].path: 'mlq/up' matches no parameter"),
        (Optimizer(rules=(Rule("mlp"), Rule("mlp/up"))), r"rules\[1\].path: 'mlp/up' .*an earlier rule takes"),
        (Optimizer(rules=(Rule("mlp("),)), r"optimizer.rules\[0\].path: 'mlp\(' is no regular expression"),
        (Optimizer(cooldown_steps=2), r"optimizer.cooldown_steps: .* found cosine"),
    ],
)
def test_an_invalid_setting_is_refused_by_its_key(settings: Optimizer, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_optimizer(settings, 10).init(nested(numbers(0)))


def test_warm_up_starts_above_zero_and_each_shape_ends_where_it_should() -> None:
    def rates(total: int, **keys: Any) -> list[float]:
        schedule = make_schedule(Optimizer(learning_rate=2.0, **keys), total)
        return [float(schedule(step)) for step in range(total + 1)]

    assert rates(8, warmup_steps=4, schedule="constant") == pytest.approx([0.5, 1, 1.5, 2, 2, 2, 2, 2, 2])
    assert rates(6, warmup_steps=1, schedule="linear", end_factor=0.5) == pytest.approx([2, 2, 1.8, 1.6, 1.4, 1.2, 1])
    cosine = [1 + np.cos(np.pi * p) for p in (0, 0.25, 0.5, 0.75, 1)]
    assert rates(6, warmup_steps=2, schedule="cosine") == pytest.approx([1, 2, *cosine], abs=1e-6)
    assert rates(4, schedule="constant", cooldown_steps=2) == pytest.approx([2, 2, 2, 1, 0])
    rsqrt = rates(8, warmup_steps=2, schedule="rsqrt", rsqrt_timescale=3, cooldown_steps=1)
    assert rsqrt == pytest.approx([1, 2, *(2 / np.sqrt(1 + s / 3) for s in range(6)), 0])


def test_a_warmup_and_cooldown_longer_than_the_run_are_scaled_together_to_half_of_it(caplog: Any) -> None:
    rising = make_schedule(Optimizer(learning_rate=1.0, warmup_steps=50, schedule="linear"), 8)
    assert [float(rising(step)) for step in range(9)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0])
    assert "warmup_steps=50 and cooldown_steps=0 do not fit into the run's 8 steps; they are scaled to 4 and 0" in (
        caplog.text
    )
    both = make_schedule(Optimizer(learning_rate=1.0, warmup_steps=30, cooldown_steps=10, schedule="constant"), 16)
    assert [float(both(step)) for step in range(17)] == pytest.approx(
        [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, *[1] * 9, 1, 0.5, 0]
    )
    never = make_schedule(Optimizer(learning_rate=1.0, warmup_steps=4, schedule="linear"), 4)
    assert [float(never(step)) for step in range(5)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    caplog.clear()
    just = make_schedule(Optimizer(learning_rate=1.0, warmup_steps=3, cooldown_steps=1, schedule="constant"), 4)
    assert [float(just(step)) for step in range(5)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 0])
    assert caplog.text == ""

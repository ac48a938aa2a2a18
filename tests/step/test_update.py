"""Four training steps against the reference in float64, on one device and on four, and the random numbers of steps.

Parameters, their average and the images are random, so that a test fails if one of them is not used. Adam's epsilon is
large: the gradient of the keys' bias is zero except for rounding, which a small epsilon would amplify to a full step.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from reference import Flat, flattened, gradient_of, nested
from reference import State as Reference
from reference import train_step as reference_step
from states import batch_of, random_parameters, state_of

from vit_dist import config
from vit_dist.plan.compile import held_bytes
from vit_dist.program import Program
from vit_dist.step import augment
from vit_dist.step.state import make_state

STEPS, TOTAL, BATCH, CLASSES = 4, 6, 16, 7
FOUR_DEVICES = {"mesh.data": 2, "mesh.fsdp": 2}
SOFTMAX = {
    "loss": "softmax", "mixup": 0.8, "label_smoothing": 0.1, "ema_decay": 0.2, "seed": 3,
    "model.pool": "cls", "model.activation": "gelu", "model.qkv_bias": True, "data.mean": 0.4, "data.std": 0.3,
    "data.interpolation": "bicubic",
    "optimizer.clip": 3.3, "optimizer.warmup_steps": 2, "optimizer.end_factor": 0.1,
}  # fmt: skip
SIGMOID = {
    "loss": "sigmoid", "cutmix": 1.0, "label_smoothing": 0.2, "ema_decay": 0.9, "seed": 4, "accumulate_steps": 2,
    "model.pool": "mean", "model.activation": "gelu_tanh", "model.layer_scale": 0.5, "optimizer.layer_decay": 0.6,
    "optimizer.rules": [
        {"path": "^patch", "frozen": True}, {"path": "head|norm1", "learning_rate": 2.0, "weight_decay": 1.0},
    ],
    "data.flip": True, "data.crop_area": (0.1, 0.2),  # which the host has done
    "data.repeats": 3,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "softmax on one device": SOFTMAX,
    "softmax on data=2 x fsdp=2": {**SOFTMAX, **FOUR_DEVICES},
    "sigmoid in 2 micro-batches on one device": SIGMOID,
    "sigmoid in 4 micro-batches on data=2 x fsdp=2": {
        **SIGMOID, **FOUR_DEVICES, "accumulate_steps": 4, "accumulate_gather": "step", "binarize_targets": True,
    },
}  # fmt: skip


def settings(keys: dict[str, Any]) -> config.Config:
    small = {
        "width": 16, "depth": 2, "mlp": 24, "heads": 2, "scan": True, "image_size": 8, "patch_size": 4,
        "channels": 2, "num_classes": CLASSES,
    }  # fmt: skip
    rates = {"learning_rate": 1e-2, "weight_decay": 0.3, "b1": 0.8, "b2": 0.9, "eps": 1e-3}
    flat = {f"model.{name}": number for name, number in small.items()}
    flat |= {f"optimizer.{name}": number for name, number in rates.items()}
    flat |= {"total_steps": TOTAL, "batch_size": BATCH, "mesh.data": 1} | keys
    return config.resolve(nested({key.replace(".", "/"): item for key, item in flat.items()}))


def examples(step: int, size: tuple[int, int] = (11, 6)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(step)
    return {
        "image": rng.integers(0, 256, (BATCH, *size, 2), dtype=np.uint8),
        "label": rng.integers(0, CLASSES, BATCH, dtype=np.int32),
    }


def fetched(tree: Any) -> Flat:
    """The arrays by path, without the optimizer's placeholders for frozen ones."""
    leaves = flattened(jax.tree.map(np.asarray, tree))
    return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, np.ndarray)}


@dataclasses.dataclass
class Step:
    """The result of one step of ours."""

    parameters: Flat
    average: Flat
    first: Flat  # moments
    second: Flat
    metrics: dict[str, float]


@dataclasses.dataclass
class Run:
    settings: config.Config
    start: Reference
    steps: list[Step]
    drawn: dict[bytes, np.ndarray]  # by the key of each mix: the weight of each pixel's own image, [H, W]


@functools.cache
def run(name: str) -> Run:
    """Four steps of `Program.train_step`."""
    drawn: dict[bytes, np.ndarray] = {}

    def spy(images: jax.Array, targets: jax.Array, key: jax.Array, **alphas: float) -> Any:
        probe = np.zeros((2, *images.shape[1:3], 1), np.float32)
        probe[0] = 1
        weights = mix(probe, np.zeros((2, 1), np.float32), key, **alphas)[0][0, :, :, 0]
        jax.debug.callback(
            lambda key, weights: drawn.setdefault(key.tobytes(), np.asarray(weights, np.float64)),
            jax.random.key_data(key),
            weights,
        )
        return mix(images, targets, key, **alphas)

    mix, configured = augment.mix, settings(RUNS[name])
    program = Program(configured, classes=CLASSES, steps=TOTAL, augment_on_device=not configured.data.flip)
    with program.in_use(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "mix", spy)
        parameters, average = random_parameters(program, 0), random_parameters(program, 1)
        state, steps = state_of(program, nested(parameters), nested(average)), []
        for number in range(STEPS):
            state, metrics = program.train_step(state, batch_of(program, **examples(number)))
            moments = [optax.tree_utils.tree_get(state.optimizer, moment) for moment in ("mu", "nu")]
            trees = [fetched(tree) for tree in (state.parameters, state.ema, *moments)]
            steps.append(Step(*trees, {key: float(value) for key, value in metrics.items()}))
    jax.effects_barrier()
    return Run(configured, Reference(parameters, average), steps, drawn)


@functools.cache
def expected(name: str) -> list[tuple[Reference, dict[str, float]]]:
    ours, states = run(name), []
    state = ours.start
    for number, weights in enumerate(ours.drawn.values()):
        batch = examples(number)
        state, metrics = reference_step(ours.settings, TOTAL, state, batch["image"], batch["label"], weights)
        states.append((state, metrics))
    return states


def largest_difference(ours: Flat, wanted: Flat) -> float:
    assert ours.keys() == wanted.keys()
    return max(float(np.abs(ours[path] - wanted[path]).max()) for path in wanted)


# Float32 resolves 1.2e-7 of a parameter between 1 and 2, and of gradients near 1; if Adam's root is near zero, a rate
# of 2e-2 over an epsilon of 1e-3 amplifies the gradient's rounding twentyfold. The largest difference observed is
# 8.8e-7; a step moves parameters by 1e-2.
TOLERANCE = 4e-6


@pytest.mark.parametrize("name", RUNS)
def test_four_steps_agree_with_the_reference(name: str, record_property: Any) -> None:
    assert len(run(name).drawn) == STEPS
    largest = {}
    for number, (ours, (state, metrics)) in enumerate(zip(run(name).steps, expected(name), strict=True)):
        for tree in ("parameters", "average", "first", "second"):
            largest[tree, number] = largest_difference(getattr(ours, tree), getattr(state, tree))
        for metric in metrics:
            largest[metric, number] = abs(ours.metrics[metric] / metrics[metric] - 1)
        assert ours.metrics.keys() == metrics.keys()
    record_property("largest_difference", max(largest.values()))
    print(f"largest difference: {max(largest.values()):.1e}")
    assert {key: difference for key, difference in largest.items() if difference > TOLERANCE} == {}


def test_the_four_steps_clip_some_gradients_and_not_others_and_warm_up_before_they_decay() -> None:
    metrics = [measured for _, measured in expected("softmax on one device")]
    assert {measured["grad_norm"] > SOFTMAX["optimizer.clip"] for measured in metrics} == {True, False}
    rates = [measured["learning_rate"] for measured in metrics]
    assert rates[0] < rates[1] == rates[2] > rates[3]


@pytest.mark.parametrize("keys", [SOFTMAX, SIGMOID], ids=["softmax", "sigmoid"])
def test_the_gradient_of_the_reference_is_the_slope_of_its_loss(keys: dict[str, Any]) -> None:
    configured, rng = settings(keys), np.random.default_rng(5)
    parameters = random_parameters(Program(configured, classes=CLASSES, steps=1, augment_on_device=True), 6)
    images, targets = rng.normal(size=(BATCH, 8, 8, 2)), rng.dirichlet(np.ones(CLASSES), BATCH)
    direction = {path: rng.normal(size=leaf.shape) for path, leaf in parameters.items()}

    def loss(step: float) -> float:
        moved = {path: leaf + step * direction[path] for path, leaf in parameters.items()}
        return gradient_of(configured, moved, images, targets)[1]

    gradient, _ = gradient_of(configured, parameters, images, targets)
    slope = sum(float((gradient[path] * direction[path]).sum()) for path in gradient)
    assert (loss(1e-5) - loss(-1e-5)) / 2e-5 == pytest.approx(slope, rel=1e-7)


def test_the_seed_and_the_step_alone_decide_how_a_batch_is_mixed() -> None:
    on_one, on_four, other_seed = (run(name).drawn for name in list(RUNS)[:3])
    assert on_one.keys() == on_four.keys() and len(on_one) == STEPS
    assert not on_one.keys() & other_seed.keys()


def test_no_two_steps_micro_batches_blocks_or_examples_share_a_random_number() -> None:
    keys: list[bytes] = []  # every key that is drawn from or split
    draws: list[np.ndarray] = []

    def spied(function: Any) -> Any:
        def spy(key: jax.Array, *arguments: Any, **keywords: Any) -> jax.Array:
            jax.debug.callback(lambda data: keys.append(data.tobytes()), jax.random.key_data(key))
            result = function(key, *arguments, **keywords)
            if not jax.dtypes.issubdtype(result.dtype, jax.dtypes.prng_key):
                jax.debug.callback(lambda numbers: draws.append(np.asarray(numbers)), result)
            return result

        return spy

    rows, micro = 12, 6  # sizes that no other dimension has
    rates = {f"model.{name}": 0.5 for name in ("dropout", "embedding_dropout", "attention_dropout", "drop_path")}
    keys_of_mix = {"mixup": 0.5, "cutmix": 0.5, "data.flip": True}
    keys_of_batch = {"batch_size": rows, "accumulate_steps": rows // micro}
    program = Program(
        settings(keys_of_batch | keys_of_mix | rates), classes=CLASSES, steps=TOTAL, augment_on_device=True
    )
    with program.in_use(), pytest.MonkeyPatch.context() as patch:
        for name in ("split", "bernoulli", "bits", "uniform"):
            patch.setattr(jax.random, name, spied(getattr(jax.random, name)))
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), program.abstract_state().parameters)
        state = state_of(program, zeros)
        for number in range(2):
            batch = {name: array[:rows] for name, array in examples(number).items()}
            state, _ = program.train_step(state, batch_of(program, **batch))
        jax.effects_barrier()

    # Once a step: the flips, and the kind, share and box of the mix. In each micro-batch: dropout of the embedding, and
    # in each of two blocks two draws in the attention, two in the MLP and the drop-path of both.
    assert len(draws) == 2 * (4 + rows // micro * (1 + 2 * 6))
    assert len(set(keys)) == len(keys) > len(draws)
    by_example = [draw for draw in draws if draw.ndim > 1]
    assert len(by_example) == len(draws) - 2 * 3  # only the mix's draws are for the full batch
    for draw in by_example:
        count = rows if rows in draw.shape else micro
        assert count in draw.shape
        examples_first = np.moveaxis(draw, draw.shape.index(count), 0)
        assert len({numbers.tobytes() for numbers in examples_first}) == count


@pytest.mark.parametrize("name", ["softmax on data=2 x fsdp=2", "sigmoid in 2 micro-batches on one device"])
@pytest.mark.filterwarnings("error:Some donated buffers")
def test_the_buffers_of_the_state_are_updated_in_place(name: str) -> None:
    configured = settings(RUNS[name])
    program = Program(configured, classes=CLASSES, steps=TOTAL, augment_on_device=True)
    with program.in_use():
        state = program.abstract_state()
        compiled = program.train_step.lower(state, program.abstract_batch()).compile()
    held = held_bytes(state, {})
    assert held["parameters"] == held["ema"] > 0
    memory = compiled.memory_analysis()
    assert memory is not None and memory.alias_size_in_bytes == sum(held.values())


def test_a_new_state_depends_on_the_seed_and_its_average_equals_the_parameters() -> None:
    program = Program(settings({"model.depth": 1}), classes=CLASSES, steps=TOTAL, augment_on_device=True)
    first, again, other = (
        make_state(program.model, program.optimizer, seed, ema) for seed, ema in ((0, True), (0, False), (1, False))
    )
    assert first.step == 0 and again.ema is None and first.ema is not None
    kernel = "patch/kernel"
    assert largest_difference(fetched(first.parameters), fetched(again.parameters)) == 0
    assert largest_difference(fetched(first.parameters), fetched(first.ema)) == 0
    assert np.abs(fetched(first.parameters)[kernel] - fetched(other.parameters)[kernel]).min() > 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(first.optimizer))

"""Compares the time of a training step of vit_dist with that of a plain Flax Linen trainer, in one process.

    python benchmarks/step.py                                                       # the lesson's model, 8 fake devices
    python benchmarks/step.py --model=B/16 --batch-size=256 --dtype=bfloat16 --fake-devices=0 --steps=60     # a GPU

Both train the same architecture with the same optimizer on a single batch, which stays on the devices. Rounds of a few
steps alternate, so that other load of the machine affects both; figures are medians over the rounds. Results go to
stdout: a table, then one JSON object. A `ratio` above 1 means that vit_dist is faster.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import linen_baseline
import numpy as np
import optax

from vit_dist import config, recipes
from vit_dist.job import processes
from vit_dist.mesh import feed
from vit_dist.model import vit
from vit_dist.program import Program
from vit_dist.step.state import State

LESSON = Path(__file__).parent.parent / "configs" / "d2l_fashion_mnist.py"


class Trainer(Protocol):
    """One side of the comparison."""

    name: str

    def in_use(self) -> contextlib.AbstractContextManager: ...
    def step(self) -> None: ...
    def block(self) -> float: ...
    def parameters(self) -> int: ...


class Ours:
    """vit_dist's own compiled step on one batch."""

    name = "vit_dist"

    def __init__(
        self,
        settings: config.Config,
        images: np.ndarray,
        labels: np.ndarray,
        new_state: Callable[[Program], State] = Program.new_state,
    ):
        """Puts the batch on the devices; `new_state` makes the state before the first step, with the mesh in use."""
        assert settings.model.num_classes is not None
        self.program = Program(settings, classes=settings.model.num_classes, steps=10_000, augment_on_device=False)
        with self.in_use():
            self._state = new_state(self.program)
            sharding = feed.batch_sharding(self.program.mesh)
            self._batch = feed.put({"image": images, "label": labels}, sharding, settings.batch_size)
        self._metrics: dict[str, jax.Array] = {}

    def in_use(self) -> contextlib.AbstractContextManager:
        """Returns the context in which to call the steps."""
        return self.program.in_use()

    def compile(self) -> jax.stages.Compiled:
        """Compiles the step, which the first call then reuses."""
        with self.in_use():
            return self.program.train_step.lower(self._state, self._batch).compile()

    def step(self) -> None:
        """Dispatches one step."""
        self._state, self._metrics = self.program.train_step(self._state, self._batch)

    def block(self) -> float:
        """Waits for all steps; returns the loss of the last."""
        return float(jax.block_until_ready((self._state, self._metrics))[1]["loss"])

    def parameters(self) -> int:
        """Returns the number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._state.parameters))


def settings_for(model: str, batch_size: int, dtype: str) -> config.Config:
    """Returns the config of the lesson's recipe, or of a variant at 224 pixels with AdamW and 1000 classes."""
    shared = [f"batch_size={batch_size}", f"model.dtype={dtype}"]
    if model == "d2l":
        return recipes.load(LESSON, shared)
    values: dict[str, Any] = {
        "total_steps": 10_000,
        "batch_size": batch_size,
        "model": {"variant": model, "num_classes": 1000, "dtype": dtype},
        "optimizer": {"name": "adamw", "weight_decay": 0.1, "schedule": "constant"},
    }
    return config.resolve(values)


def baseline_for(settings: config.Config, images: np.ndarray, labels: np.ndarray) -> linen_baseline.Trainer:
    """Returns the Linen trainer of the same model and optimizer; its images are floats, normalised before."""
    model, shape = settings.model, vit.shape_of(settings.model)
    assert model.num_classes is not None
    peer = linen_baseline.ViT(
        width=shape.width,
        depth=shape.depth,
        hidden=shape.mlp,
        heads=shape.heads,
        patch=shape.patch,
        classes=model.num_classes,
        dropout=model.dropout,
        embedding_dropout=model.embedding_dropout,
        attention_dropout=model.attention_dropout,
        attention_bias=model.qkv_bias,
        tanh_gelu=shape.activation == "gelu_tanh",
        dtype=jax.numpy.dtype(model.dtype),
    )
    rate, decay = settings.optimizer.learning_rate, settings.optimizer.weight_decay
    optimizer = (
        optax.sgd(rate)
        if settings.optimizer.name == "sgd"
        else optax.adamw(rate, weight_decay=decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    )
    return linen_baseline.Trainer(peer, optimizer, images.astype(np.float32) / 255, labels)


class Side:
    """A trainer and its measurements, in seconds."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.first_step_seconds = 0.0  # compilation included
        self.step_seconds: list[float] = []  # the mean step of each round
        self.python_seconds: list[float] = []  # to dispatch a step on idle devices, once a round
        self.loss = 0.0

    def round(self, steps: int) -> float:
        """Runs so many steps, from idle devices to idle devices; returns the mean seconds of a step."""
        with self.trainer.in_use():
            begun = time.perf_counter()
            self.trainer.step()
            self.python_seconds.append(time.perf_counter() - begun)
            for _ in range(steps - 1):
                self.trainer.step()
            self.loss = self.trainer.block()
            return (time.perf_counter() - begun) / steps


def compare(trainers: list[Trainer], steps: int, rounds: int) -> list[Side]:
    """Warms up both, then runs rounds of so many steps; the sides take turns in going first."""
    sides = [Side(trainer) for trainer in trainers]
    for side in sides:
        side.first_step_seconds = side.round(1)
        side.round(1)  # the second call may compile again, for the layouts that the first returned
        side.python_seconds.clear()
    for turn in range(rounds):
        for side in sides if turn % 2 else reversed(sides):
            side.step_seconds.append(side.round(steps))
    return sides


def print_results(sides: list[Side], batch_size: int, described: dict[str, Any]) -> None:
    """Prints the table and the JSON object."""
    results = {
        side.trainer.name: {
            "images_per_second": batch_size / statistics.median(side.step_seconds),
            "step_ms": statistics.median(side.step_seconds) * 1000,
            "first_step_seconds": side.first_step_seconds,
            "python_ms": statistics.median(side.python_seconds) * 1000,
            "last_loss": side.loss,
        }
        for side in sides
    }
    names = list(next(iter(results.values())))
    print(f"{'':12}" + "".join(f"{name:>20}" for name in names))
    for name, row in results.items():
        print(f"{name:12}" + "".join(f"{value:20,.3f}" for value in row.values()))
    ours, peer = sides
    # the ratio of each round, since both sides of a round ran within seconds of each other
    ratio = statistics.median(theirs / own for own, theirs in zip(ours.step_seconds, peer.step_seconds, strict=True))
    print(f"ratio (linen's step time over ours): {ratio:.3f}")
    print(json.dumps({"ratio": ratio, **results, **described}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compares the time of a training step with a plain Flax Linen trainer's."
    )
    parser.add_argument("--model", default="d2l", help="d2l (the lesson's) or a variant such as B/16 (d2l)")
    parser.add_argument("--batch-size", type=int, default=128, help="examples a step, over all devices (128)")
    parser.add_argument("--dtype", default="float32", help="of the arithmetic: float32 or bfloat16 (float32)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each side in a round (3)")
    parser.add_argument("--rounds", type=int, default=9, help="how often the two sides take turns (9)")
    parser.add_argument("--fake-devices", type=int, default=8, help="CPU devices to pretend to have; 0: real ones (8)")
    options = parser.parse_args()

    processes.start(options.fake_devices)
    settings = settings_for(options.model, options.batch_size, options.dtype)
    shape = vit.shape_of(settings.model)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (options.batch_size, *shape.image, shape.channels), np.uint8)
    labels = draw.integers(0, shape.classes, options.batch_size, np.int32)
    ours, peer = Ours(settings, images, labels), baseline_for(settings, images, labels)
    assert ours.parameters() == peer.parameters(), f"{ours.parameters():,} against {peer.parameters():,} parameters"
    sides = compare([ours, peer], options.steps, options.rounds)
    device = jax.devices()[0]
    print_results(
        sides,
        options.batch_size,
        {
            "model": options.model,
            "parameters": ours.parameters(),
            "batch_size": options.batch_size,
            "dtype": options.dtype,
            "devices": f"{jax.device_count()} x {device.device_kind}",
            "jax": jax.__version__,
        },
    )


if __name__ == "__main__":
    main()

"""Compares the time of a training step of vit_dist with that of another trainer, in one process.

    python benchmarks/step.py                                             # the lesson's model beside Flax Linen
    python benchmarks/step.py --peer=bigvision --model=cifar10 model.scan=false         # keys of the config at the end
    python benchmarks/step.py --peer=timm-compiled --model=B/16 --batch-size=256 --dtype=bfloat16 --steps=60 \\
        --fake-devices=0                                                  # on a GPU; else on 8 fake devices of the CPU

Both train the same architecture with the same optimizer on a single batch, which stays on the devices. Rounds of a few
steps alternate, so that other load of the machine affects both; figures are medians over the rounds. Results go to
stdout: a table, then one JSON object. A `ratio` above 1 means that vit_dist is faster; `cpu_ratio` compares the
processor time of a step instead of the wall clock's, which other programs disturb less.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import bigvision_baseline
import jax
import linen_baseline
import numpy as np
import timm_baseline

from vit_dist import config, recipes
from vit_dist.config import ConfigError
from vit_dist.job import processes
from vit_dist.mesh import feed
from vit_dist.model import vit
from vit_dist.program import Program
from vit_dist.step.state import State

CONFIGS = Path(__file__).parent.parent / "configs"
PEERS = ("linen", "bigvision", "timm", "timm-compiled")
# CIFAR-10's recipe without what the peers do not have: augmentation, drop-path, averages, a schedule.
PLAIN = (
    *("label_smoothing=0", "mixup=0", "ema_decay=0", "model.drop_path=0"),
    *("data.crop_area=null", "data.flip=false", "data.rotate=0", "optimizer.schedule=constant"),
    "optimizer.warmup_steps=0",
)


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


def settings_for(model: str, batch_size: int, dtype: str, overrides: Sequence[str] = ()) -> config.Config:
    """Returns the config of a comparison.

    Args:
      model: "d2l": the lesson's recipe; "cifar10": that of CIFAR-10, but for `PLAIN`; else a variant, at 224 pixels
        with AdamW and 1000 classes.
      batch_size: over all devices.
      dtype: of the arithmetic.
      overrides: further keys, such as "model.scan=false".
    """
    changes = [f"batch_size={batch_size}", f"model.dtype={dtype}", *overrides]
    if model == "d2l":
        return recipes.load(CONFIGS / "d2l_fashion_mnist.py", changes)
    if model == "cifar10":
        return recipes.load(CONFIGS / "cifar10.py", [*PLAIN, *changes])
    values: dict[str, Any] = {
        "total_steps": 10_000,
        "model": {"variant": model, "num_classes": 1000},
        "optimizer": {"name": "adamw", "weight_decay": 0.1, "schedule": "constant"},
    }
    return config.resolve(recipes.override(config.to_dict(config.resolve(values)), changes))


def peer_for(name: str, settings: config.Config, images: np.ndarray, labels: np.ndarray) -> Trainer:
    """Returns the trainer of this name, one of `PEERS`, with the model and the optimizer of the config.

    Args:
      name: one of `PEERS`.
      settings: the config.
      images: uint8 [B, H, W, C].
      labels: int32 [B].

    Raises:
      ConfigError: the peer does not have what the config asks for, or is not installed.
    """
    sizes, update = _sizes(settings.model), _update(settings)
    mean, std = (_numbers(value) for value in (settings.data.mean, settings.data.std))
    if name.startswith("timm"):
        compiled = name == "timm-compiled"
        return timm_baseline.Trainer(sizes, update, images, labels, mean=mean, std=std, compiled=compiled)
    # theirs are normalised beforehand
    floats = (images.astype(np.float32) / 255 - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    make = {"linen": linen_baseline.make_trainer, "bigvision": bigvision_baseline.make_trainer}[name]
    return make(sizes, update, floats, labels)


def _numbers(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _sizes(model: config.Model) -> linen_baseline.Sizes:
    shape = vit.shape_of(model)
    _check(
        {
            "model.pool": (model.pool, ("cls", "mean")),
            "model.registers": (model.registers, (0,)),
            "model.drop_path": (model.drop_path, (0,)),
            "model.layer_scale": (model.layer_scale, (None,)),
            "model.qk_norm": (shape.qk_norm, (False,)),
            "model.parallel": (shape.parallel, (False,)),
            "model.activation": (shape.activation, ("gelu", "gelu_tanh")),
            "model.projection_bias": (model.projection_bias, (model.qkv_bias,)),
            "model.pre_logits": (model.pre_logits, (None,)),
        }
    )
    return linen_baseline.Sizes(
        width=shape.width,
        depth=shape.depth,
        hidden=shape.mlp,
        heads=shape.heads,
        patch=shape.patch,
        classes=shape.classes,
        pool=model.pool,
        position=model.position,
        cls_position=model.cls_position,
        dropout=model.dropout,
        projection_dropout=model.dropout if model.projection_dropout is None else model.projection_dropout,
        embedding_dropout=model.embedding_dropout,
        attention_dropout=model.attention_dropout,
        attention_bias=model.qkv_bias,
        tanh_gelu=shape.activation == "gelu_tanh",
        head_zero_init=model.head_zero_init,
        dtype=jax.numpy.dtype(model.dtype),
    )


def _update(settings: config.Config) -> linen_baseline.Update:
    optimizer, is_sgd = settings.optimizer, settings.optimizer.name == "sgd"
    _check(
        {
            "optimizer.name": (optimizer.name, ("sgd", "adam", "adamw")),
            "optimizer.momentum": (optimizer.momentum if is_sgd else 0.0, (0.0,)),
            "optimizer.weight_decay": (optimizer.weight_decay if is_sgd else 0.0, (0.0,)),
            "optimizer.nesterov": (optimizer.nesterov, (False,)),
            "optimizer.schedule": (optimizer.schedule, ("constant",)),
            "optimizer.warmup_steps": (optimizer.warmup_steps, (0,)),
            "optimizer.rules": (optimizer.rules, ((),)),
            "loss": (settings.loss, ("softmax",)),
            "label_smoothing": (settings.label_smoothing, (0,)),
            "mixup": (settings.mixup, (0,)),
            "cutmix": (settings.cutmix, (0,)),
            "ema_decay": (settings.ema_decay, (0,)),
            "accumulate_steps": (settings.accumulate_steps, (1,)),
        }
    )
    return linen_baseline.Update(
        adam=not is_sgd,
        rate=optimizer.learning_rate,
        decay=optimizer.weight_decay,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        moment_dtype=optimizer.moment_dtype,
        clip=optimizer.clip,
    )


def _check(values: dict[str, tuple[Any, tuple[Any, ...]]]) -> None:
    """Raises `ConfigError` for the first key whose value is none of those that the peers have."""
    for key, (value, known) in values.items():
        if value not in known:
            raise ConfigError(f"{key}: the peers have only {', '.join(map(str, known))}; found {value}")


class Side:
    """A trainer and its measurements, in seconds."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.first_step_seconds = 0.0  # compilation included
        self.step_seconds: list[float] = []  # the mean step of each round
        self.processor_seconds: list[float] = []  # likewise, of all threads of this process, once a round
        self.python_seconds: list[float] = []  # to dispatch a step on idle devices, once a round
        self.loss = 0.0

    def round(self, steps: int) -> float:
        """Runs so many steps, from idle devices to idle devices; returns the mean seconds of a step."""
        with self.trainer.in_use():
            begun, processor = time.perf_counter(), time.process_time()
            self.trainer.step()
            self.python_seconds.append(time.perf_counter() - begun)
            for _ in range(steps - 1):
                self.trainer.step()
            self.loss = self.trainer.block()
            self.processor_seconds.append((time.process_time() - processor) / steps)
            return (time.perf_counter() - begun) / steps


def compare(trainers: list[Trainer], steps: int, rounds: int) -> list[Side]:
    """Warms up both, then runs rounds of so many steps; the sides take turns in going first."""
    sides = [Side(trainer) for trainer in trainers]
    for side in sides:
        side.first_step_seconds = side.round(1)
        side.round(1)  # the second call may compile again, for the layouts that the first returned
        side.python_seconds.clear()
        side.processor_seconds.clear()
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
            "cpu_ms": statistics.median(side.processor_seconds) * 1000,
            "first_step_seconds": side.first_step_seconds,
            "python_ms": statistics.median(side.python_seconds) * 1000,
            "last_loss": side.loss,
        }
        for side in sides
    }
    names = list(next(iter(results.values())))
    print(f"{'':14}" + "".join(f"{name:>20}" for name in names))
    for name, row in results.items():
        print(f"{name:14}" + "".join(f"{value:20,.3f}" for value in row.values()))
    ours, peer = sides
    ratios = {
        "ratio": _ratio(ours.step_seconds, peer.step_seconds),
        "cpu_ratio": _ratio(ours.processor_seconds, peer.processor_seconds),
    }
    for name, value in ratios.items():
        print(f"{name} ({peer.trainer.name}'s step over ours): {value:.3f}")
    print(json.dumps({**ratios, **results, **described}))


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Returns the median ratio of a round's two sides, which ran within seconds of each other."""
    return statistics.median(their / own for own, their in zip(ours, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares the time of a training step with another trainer's.")
    parser.add_argument("--peer", choices=PEERS, default="linen", help="the other trainer (linen)")
    parser.add_argument("--model", default="d2l", help="d2l (the lesson's), cifar10 or a variant such as B/16 (d2l)")
    parser.add_argument("--batch-size", type=int, default=128, help="examples a step, over all devices (128)")
    parser.add_argument("--dtype", default="float32", help="of the arithmetic: float32 or bfloat16 (float32)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each side in a round (3)")
    parser.add_argument("--rounds", type=int, default=9, help="how often the two sides take turns (9)")
    parser.add_argument("--fake-devices", type=int, default=8, help="CPU devices to pretend to have; 0: real ones (8)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the config to change")
    options = parser.parse_args()
    try:
        run(options)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run(options: argparse.Namespace) -> None:
    """Compares and prints; see `main`. Raises `ConfigError` for what the peer does not have."""
    if options.peer.startswith("timm"):
        timm_baseline.check_installed()
        # jax would take most of a GPU's memory at its start, and leave PyTorch too little
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    settings = settings_for(options.model, options.batch_size, options.dtype, options.overrides)
    processes.start(options.fake_devices)
    shape = vit.shape_of(settings.model)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (options.batch_size, *shape.image, shape.channels), np.uint8)
    labels = draw.integers(0, shape.classes, options.batch_size, np.int32)
    ours, peer = Ours(settings, images, labels), peer_for(options.peer, settings, images, labels)
    assert ours.parameters() == peer.parameters(), f"{ours.parameters():,} against {peer.parameters():,} parameters"
    sides = compare([ours, peer], options.steps, options.rounds)
    device = jax.devices()[0]
    print_results(
        sides,
        options.batch_size,
        {
            "model": options.model,
            "overrides": options.overrides,
            "peer": options.peer,
            "parameters": ours.parameters(),
            "batch_size": options.batch_size,
            "dtype": options.dtype,
            "devices": f"{jax.device_count()} x {device.device_kind}",
            "jax": jax.__version__,
        },
    )


if __name__ == "__main__":
    main()

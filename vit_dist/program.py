"""Builds the training and evaluation functions of a config on a mesh; every verb that computes begins with a `Program`.

Building a `Program` checks what can be checked without running: the model's numbers, the mesh against the devices, each
split dimension against its axes. It allocates nothing, and compiles nothing before the first call of its functions.
"""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vit_dist import config
from vit_dist.config import ConfigError, pair
from vit_dist.data.sets.examples import Source
from vit_dist.data.stream.loader import Batches, train_batches
from vit_dist.job import processes
from vit_dist.mesh import feed, layout, topology, xla_options
from vit_dist.model import choices, context, flops, vit
from vit_dist.run.checkpoints import Checkpoints, Step
from vit_dist.run.devices import memory_bytes, memory_share, peak_flops
from vit_dist.step import evaluation, trained, update
from vit_dist.step.optimizer import make_optimizer
from vit_dist.step.schedule import make_schedule
from vit_dist.step.state import ModelFunction, Parameters, State, make_state

_log = logging.getLogger(__name__)
UNUSED = 1_000_000  # steps of the schedule of a program that does not train


class Program:
    """The model, optimizer and steps of one config on one mesh.

    Call everything with the mesh in use (`with program.in_use():`).

    Attributes:
      settings: the config with `model.num_classes` filled in, and `model.scan` and `model.remat` decided.
      steps: the length of the schedule.
      mesh: the devices.
      shape: the sizes of the model.
      model: the model as a function of parameters.
      optimizer: the optax transformation.
      train_step: `(state, batch) -> (state, metrics)`; it donates the buffers of the state.
      evaluation_step: `(parameters, batch, totals) -> totals`; it donates the buffers of the totals.
    """

    def __init__(
        self,
        settings: config.Config,
        *,
        classes: int,
        steps: int,
        augment_on_device: bool,
        devices: Sequence[jax.Device] | None = None,
    ):
        """Checks the config and builds the functions.

        Args:
          settings: the config.
          classes: how many the data have, for a config that does not say.
          steps: the length of the run, for the schedule.
          augment_on_device: whether batches hold images at their own size, for the device to crop, resize and flip.
          devices: the devices of the mesh; None: all that are attached.

        Raises:
          ConfigError: naming the key that does not fit.
        """
        if settings.model.num_classes is None:
            settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, num_classes=classes))
        if settings.model.num_classes == 0:
            raise ConfigError(
                "model.num_classes: 0 is a model without a head, which can be neither trained nor evaluated; give the "
                "number of classes, or null for that of the data"
            )
        self.mesh = make_mesh(settings, list(devices if devices is not None else jax.devices()))
        first = self.mesh.devices.flat[0]
        settings = decided(settings, first.platform, first.device_kind, self.mesh.size, memory_bytes(first))
        self.settings, self.steps, model = settings, steps, settings.model
        self.shape = vit.shape_of(model)
        if devices is None and self.mesh.size < jax.device_count():
            idle = jax.device_count() - self.mesh.size
            _log.warning("mesh: %d of the %d devices stay idle; set one axis to -1", idle, jax.device_count())
        self.model = ModelFunction(model, settings.lora)
        rules = trained.rules_of(settings)
        self.optimizer = make_optimizer(settings.optimizer, steps, rules=rules, depth=self.shape.depth)
        schedule = make_schedule(settings.optimizer, steps)
        options = _compiler_options(settings, first.platform)
        train_step = update.make_train_step(
            settings, self.model, self.optimizer, schedule, augment_on_device=augment_on_device
        )
        self.train_step = jax.jit(train_step, donate_argnums=0, compiler_options=options)
        evaluation_step = evaluation.make_evaluation_step(settings, self.model, augment_on_device=augment_on_device)
        self.evaluation_step = jax.jit(evaluation_step, donate_argnums=2, compiler_options=options)

    def check_training_batch(self) -> None:
        """Raises `ConfigError` where the training batch does not divide over the mesh; an evaluation's need not."""
        sizes = dict(self.mesh.shape)
        layout.check_divides("batch_size", self.settings.batch_size, "batch", sizes, self.settings.accumulate_steps)

    def check_memory(self, held: Any, batches: Mapping[str, int]) -> None:
        """Raises `ConfigError` where a device cannot hold what it must.

        Args:
          held: a tree of `jax.ShapeDtypeStruct`s with their shardings.
          batches: key of the config -> how many images a batch has; one batch is held at a time.
        """
        limit = memory_share(self.mesh.local_devices[0])
        image = math.prod((*self.image_size(), self.settings.model.channels))
        shares = math.prod(size for axis, size in self.mesh.shape.items() if axis in layout.TABLE["batch"])
        needed = {"model": layout.bytes_per_device(held)}
        needed |= {key: rows * image // shares for key, rows in batches.items()}
        for key, size in needed.items():
            if size > limit:
                what = "its state takes" if key == "model" else f"the images of {batches[key]:,} take"
                raise ConfigError(
                    f"{key}: {what} {size / 2**30:,.1f} GiB of a device's memory, which is {limit / 2**30:,.1f} GiB; "
                    f"take {'a smaller one' if key == 'model' else 'fewer'}, or split over more devices"
                )

    def in_use(self) -> Any:
        """Returns a context in which jax knows the mesh."""
        return jax.set_mesh(self.mesh)

    def abstract_state(self) -> State:
        """Returns the shapes, dtypes and shardings of the state."""
        return jax.eval_shape(self._make_state)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes, dtypes and shardings of a training batch, with images of the model's size."""
        rows, sharding = self.settings.batch_size, feed.batch_sharding(self.mesh)
        images = (rows, *self.image_size(), self.settings.model.channels)
        shapes = {"image": (images, np.uint8), "label": ((rows,), np.int32), "id": ((rows,), np.int32)}
        return {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}

    def new_state(self) -> State:
        """Returns the state before the first step; every device makes only its own shards."""
        make = jax.jit(self._make_state)
        processes.compile_together(make)
        return make()

    def training_batches(self, source: Source, start_step: int, stop_step: int) -> Batches:
        """Returns this process's rows of the batches of steps `start_step` to `stop_step - 1`."""
        settings = self.settings
        return train_batches(
            source,
            settings.data,
            image_size=self.image_size(),
            channels=settings.model.channels,
            seed=settings.seed,
            batch_size=settings.batch_size,
            rows=self.local_rows(settings.batch_size),
            start_step=start_step,
            stop_step=stop_step,
        )

    def local_rows(self, batch_size: int) -> np.ndarray:
        """Returns the rows of a global batch that this process reads."""
        return feed.local_rows(self.mesh, batch_size)

    def evaluation_batch_size(self) -> int:
        """Returns `evaluate.batch_size`, rounded up so that every device has as many rows; added rows are masked."""
        return feed.rounded_up(self.mesh, evaluation.evaluation_batch_size(self.settings))

    def image_size(self) -> tuple[int, int]:
        """Returns (height, width) of the images that the model takes."""
        return pair(self.settings.model.image_size)

    def flops_per_step(self) -> int:
        """Returns the floating-point operations of one training step over all devices."""
        passes = trained.passes(self.settings)
        return round(flops.forward_flops(self.settings.model) * passes) * self.settings.batch_size

    def mfu(self, step_seconds: float) -> float | None:
        """Returns the model FLOPs utilisation of a step of this length; None where the devices' peak is unknown."""
        peak = peak_flops(self.mesh.devices.flat[0].device_kind, self.settings.model.dtype)
        return None if peak is None else self.flops_per_step() / (step_seconds * peak * self.mesh.size)

    def _make_state(self) -> State:
        return make_state(self.model, self.optimizer, self.settings.seed, self.settings.ema_decay > 0)


@contextlib.contextmanager
def restored(
    workdir: Path, settings: config.Config, *, augment_on_device: bool, step: Step = "newest"
) -> Iterator[tuple[Program, int, dict[str, Parameters]]]:
    """Restores the parameters of a checkpoint, with the mesh in use.

    Args:
      workdir: the directory of the run.
      settings: its config.
      augment_on_device: see `Program`.
      step: which checkpoint.

    Yields:
      The program, the step, and the trees `parameters` and, where the run keeps it, `ema`.

    Raises:
      ConfigError: where there is no such checkpoint, or it is damaged.
    """
    assert settings.model.num_classes is not None
    program = Program(settings, classes=settings.model.num_classes, steps=UNUSED, augment_on_device=augment_on_device)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True, verify=settings.checkpoint.verify)
    with program.in_use():
        state = program.abstract_state()
        wanted = {"parameters": state.parameters} | ({"ema": state.ema} if state.ema is not None else {})
        program.check_memory(wanted, {"evaluate.batch_size": program.evaluation_batch_size()})
        restored_step, trees = checkpoints.restore(wanted, step)
        yield program, restored_step, trees


def decided(settings: config.Config, platform: str, kind: str, devices: int, memory_bytes: int | None) -> config.Config:
    """Returns a config without "auto" in `model.scan` and `model.remat`, on so many devices; see `model.choices`.

    A deterministic one has its attention computed by XLA on GPUs. With `xla_gpu_deterministic_ops`, XLA asks cuDNN for
    a repeatable backward pass in the first of equal blocks only, and loses the program of the others (seen on an H100
    with jax 0.11.2: the first step ends with `IndexError: raw_hash_map::at`).

    Blocks of which only some are trained are not stacked.

    Raises:
      ConfigError: it is deterministic, and `model.attention` is "cudnn".
    """
    examples, model = settings.batch_size / (devices * settings.accumulate_steps), settings.model
    if settings.deterministic and platform in ("gpu", "cuda"):
        if model.attention == "cudnn":
            raise ConfigError(
                "model.attention: XLA cannot compile cudnn's backward pass to be deterministic; take auto or xla, or "
                "deterministic=false"
            )
        if model.attention == "auto":
            _log.info("model.attention=auto: xla, which is deterministic")
        model = dataclasses.replace(model, attention="xla")
    if model.scan == "auto" and trained.cuts_blocks(settings):
        _log.info("model.scan=auto: false, for init.freeze=%s", settings.init.freeze)
        model = dataclasses.replace(model, scan=False)
    # The number of classes, which may be left to the data, makes no difference.
    with_classes = dataclasses.replace(model, num_classes=model.num_classes or 1)
    chosen = choices.decided(with_classes, platform, kind, examples=examples, memory_bytes=memory_bytes)
    return dataclasses.replace(settings, model=dataclasses.replace(model, scan=chosen.scan, remat=chosen.remat))


def check_model(model: config.Model, sizes: dict[str, int]) -> None:
    """Raises `ConfigError` where a model cannot be split over axes of these sizes; its `num_classes` is filled in."""
    shape = vit.shape_of(model)
    layout.check_divides("model.width", shape.width, "width", sizes)
    layout.check_divides("model.heads", shape.heads, "heads", sizes)
    layout.check_divides("model.mlp", shape.mlp, "mlp", sizes)
    context.check(model.context_attention, model.attention, shape.heads, model.attention_dropout, sizes)


def _compiler_options(settings: config.Config, platform: str) -> dict[str, int | bool]:
    options = xla_options.options_for(platform, unrolled=not settings.model.scan) if settings.xla_options else {}
    if settings.deterministic and platform in ("gpu", "cuda"):
        options["xla_gpu_deterministic_ops"] = True
    return options


def make_mesh(settings: config.Config, devices: list[jax.Device]) -> Mesh:
    """Returns the mesh of these devices that the config asks for, with its `model.num_classes` filled in.

    Raises `ConfigError` where there are too few of them, the model cannot be split so, or a process would have none.
    """
    sizes = topology.axis_sizes(settings.mesh, len(devices))
    check_model(settings.model, sizes)
    mesh = topology.make_mesh(sizes, devices)
    if jax.process_count() > 1 and mesh.size < len(devices):
        raise ConfigError(
            f"mesh: takes {mesh.size} of the {len(devices)} devices of {jax.process_count()} processes, which would "
            "leave some processes idle; set one axis to -1"
        )
    return mesh

"""How fast a config trains on the devices at hand: the real step, fed by the real data."""

import contextlib
import statistics
import time
from typing import Any

import jax

from vit_dist.config import ConfigError
from vit_dist.data.stream.pixels import augments_on_device
from vit_dist.evaluate import open_split
from vit_dist.initial import with_own_traits
from vit_dist.job import processes
from vit_dist.lengths import in_steps
from vit_dist.mesh.feed import Prefetch
from vit_dist.program import Program
from vit_dist.recipes import Overrides, Recipe, load_config


def bench(config: Recipe, overrides: Overrides = (), *, steps: int = 30) -> dict[str, Any]:
    """Measures how fast a config trains on the attached devices, and keeps nothing.

    Args:
      config: a recipe's name or file, or a config; see `load_config`.
      overrides: changes of the config, such as {"batch_size": 64}.
      steps: how many steps to measure, after the first and three that are not measured.

    Returns:
      images_per_second; step_ms; mfu, None where the devices' peak is unknown; data_wait_fraction, the share of the
      time spent waiting for the host's data; first_step_seconds, with compilation; python_ms, the median processor
      time in which the loop takes a batch and dispatches a step on idle devices; and what was measured: devices,
      device_kind, mesh, batch_size.

    Raises:
      ConfigError: naming the key or file that is wrong.
    """
    settings = load_config(config, overrides)
    if steps < 1:
        raise ConfigError(f"steps: must be above 0, found {steps}")
    processes.start(settings.fake_devices, settings.deadlines)
    settings = with_own_traits(settings)
    source = open_split(settings, "train")
    settings = in_steps(settings, len(source))
    assert settings.total_steps is not None
    on_device = augments_on_device(source, settings.data)
    program = Program(
        settings, classes=len(source.class_names), steps=settings.total_steps, augment_on_device=on_device
    )
    program.check_training_batch()
    settle, probes = 3, 15
    host_batches = program.training_batches(source, 0, 1 + settle + steps + probes)
    batches = Prefetch(host_batches, program.mesh, settings.batch_size, settings.data.prefetch)
    with contextlib.closing(host_batches), contextlib.closing(batches), program.in_use():
        program.check_memory(program.abstract_state(), {"batch_size": settings.batch_size})
        state = program.new_state()
        begun, batch = time.perf_counter(), next(batches)
        processes.compile_together(program.train_step, state, batch)
        state, metrics = program.train_step(state, batch)
        jax.block_until_ready(metrics)
        first = time.perf_counter() - begun
        for _ in range(settle):
            state, metrics = program.train_step(state, next(batches))
        jax.block_until_ready(metrics)
        waited_before = batches.waited
        begun = time.perf_counter()
        for _ in range(steps):
            state, metrics = program.train_step(state, next(batches))
        jax.block_until_ready(metrics)
        seconds, waited = time.perf_counter() - begun, batches.waited - waited_before
        processor_seconds = []
        for _ in range(probes):
            begun = time.thread_time()
            state, metrics = program.train_step(state, next(batches))
            processor_seconds.append(time.thread_time() - begun)
            jax.block_until_ready(metrics)
    step_seconds = seconds / steps
    device = program.mesh.devices.flat[0]
    return {
        "images_per_second": settings.batch_size / step_seconds,
        "step_ms": step_seconds * 1000,
        "mfu": program.mfu(step_seconds),
        "data_wait_fraction": waited / seconds,
        "first_step_seconds": first,
        "python_ms": statistics.median(processor_seconds) * 1000,
        "devices": program.mesh.size,
        "device_kind": device.device_kind,
        "mesh": dict(program.mesh.shape),
        "batch_size": settings.batch_size,
    }

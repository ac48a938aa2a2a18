"""Our compiled training step on one batch in device memory: its time, its memory, and a profile of ten steps."""

import gzip
import math
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from step import Ours, Side

from visit import models, trace
from visit.job import Job
from visit.runner import MOST_FILE
from vit_dist.run.devices import memory_in_use, peak_flops


def throughput(job: Job) -> None:
    """Keeps a step's time over several rounds, its compilation, its memory, and whether that grows.

    The first `settle` steps warm up; `rounds` times `steps` follow and are timed from idle to idle.
    """
    device, told = job.device(), job.arguments
    trainer = make(told)
    begun = time.perf_counter()
    compiled = trainer.compile()
    job.keep(
        batch=told["batch"],
        parameters=trainer.parameters(),
        compile_seconds=time.perf_counter() - begun,
        compiled_bytes=_bytes_of(compiled),
        flops_per_step=trainer.program.flops_per_step(),
        peak_flops=peak_flops(device.device_kind, "bfloat16"),
    )
    side = Side(trainer)
    side.round(told["settle"])
    side.python_seconds.clear()
    early = _held(device)
    for _ in range(told["rounds"]):
        side.step_seconds.append(side.round(told["steps"]))
    late, steps = _held(device), told["settle"] + told["rounds"] * told["steps"]
    job.keep(
        step_ms=[1000 * one for one in side.step_seconds],
        images_per_second=told["batch"] / statistics.median(side.step_seconds),
        python_ms=1000 * statistics.median(side.python_seconds),
        peak_bytes=memory_in_use([device]),
        held_bytes=[early, late],
        last_loss=side.loss,
    )
    job.check("the loss is a number", math.isfinite(side.loss), f"{side.loss}")
    if early is not None and late is not None:
        claim = f"memory held after {steps} steps is no more than after {told['settle']}"
        job.check(claim, late <= early, f"{late:,} and {early:,} bytes")


def profile(job: Job) -> None:
    """Keeps the kernels that take most of some steps and the gaps between them; the trace too, where it is small."""
    job.device()
    told, folder = job.arguments, job.scratch / "trace"
    trainer = make(told)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would slow down what dispatches the steps
    with trainer.in_use():
        for _ in range(3):
            trainer.step()
        trainer.block()
        jax.profiler.start_trace(folder, profiler_options=options)
        for _ in range(told["steps"]):
            trainer.step()
        trainer.block()
        jax.profiler.stop_trace()
    (file,) = folder.rglob("*.xplane.pb")
    _keep_trace(file, job.out / "profile.xplane.pb.gz")
    job.keep(outline=trace.outline(file))
    job.keep(**trace.summary(trace.kernels(file), told["steps"]))
    job.check("the trace holds kernels", bool(job.found["kernels_per_step"]), f"{job.found['kernels_per_step']} a step")


def make(told: dict[str, Any]) -> Ours:
    """A trainer of the model that the arguments name, with a random batch."""
    settings = models.settings(told["model"], told["batch"], told["image"], told.get("scan", False))
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (told["batch"], told["image"], told["image"], 3), np.uint8)
    return Ours(settings, images, draw.integers(0, 1000, told["batch"], np.int32), models.drawn_state)


def _bytes_of(compiled: jax.stages.Compiled) -> int | None:
    """The memory that the compiler counts for a step: arguments, temporaries, code, and results of their own."""
    of = compiled.memory_analysis()
    if of is None:
        return None
    results = of.output_size_in_bytes - of.alias_size_in_bytes
    return of.argument_size_in_bytes + of.temp_size_in_bytes + of.generated_code_size_in_bytes + results


def _held(device: jax.Device) -> int | None:
    """Bytes that the device holds now; None where it does not tell, as on a CPU."""
    return (device.memory_stats() or {}).get("bytes_in_use")


def _keep_trace(file: Path, kept: Path) -> None:
    packed = gzip.compress(file.read_bytes(), 6)
    if len(packed) <= MOST_FILE:
        kept.write_bytes(packed)

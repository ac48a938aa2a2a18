"""The plan of a run that is about to begin, on the devices that it has."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from vit_dist.plan import targets
from vit_dist.plan.account import memory, of_memory, of_run, of_time
from vit_dist.plan.compile import Step, held_bytes
from vit_dist.plan.estimate import device_flops, estimate, wires_of
from vit_dist.plan.load import attention_of, held_of
from vit_dist.plan.roofline import Work
from vit_dist.program import Program
from vit_dist.step.state import State


def plan_here(
    program: Program, executable: jax.stages.Compiled, state: State, batch: Mapping[str, jax.Array]
) -> dict[str, Any]:
    """Memory and time of a step that was compiled for the devices that are here: what `report.lines` says.

    Memory is the compiler's count. Time is by arithmetic alone, so that no run depends on how a compiler writes.
    """
    chip = targets.chip_here(program.mesh.devices.flat[0])
    settings, sizes = program.settings, dict(program.mesh.shape)
    if chip.memory_bandwidth is None:
        work = Work(device_flops(settings, attention_of(settings, chip.platform, sizes), sizes), 0, 0)
    else:
        work = estimate(settings, chip, wires_of(program.mesh, chip), held_of(settings)).work
    parts = memory(Step(program, executable, held_bytes(state, batch)), chip)
    found = {
        "device_kind": chip.kind,
        "dtype": settings.model.dtype,
        **of_memory(parts, chip),
        **of_time(program, work, chip),
    }
    run = dataclasses.replace(settings, total_steps=program.steps)
    return {**found, **of_run(run, found, program.mesh.size, jax.process_count(), None)}

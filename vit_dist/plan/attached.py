"""The plan of a run that is about to begin, on the devices that are attached."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax

from vit_dist.plan import targets
from vit_dist.plan.account import account, account_without_time, of_run
from vit_dist.plan.compile import Step, held_bytes
from vit_dist.program import Program
from vit_dist.step.state import State

_log = logging.getLogger(__name__)


def plan_attached(
    program: Program, executable: jax.stages.Compiled, state: State, batch: Mapping[str, jax.Array]
) -> dict[str, Any]:
    """Returns memory and time of a training step that was compiled for the attached devices.

    Args:
      program: what the step belongs to.
      executable: its compiled training step.
      state: the state that the run starts from.
      batch: a training batch; its shapes and shardings count.

    Returns:
      What `report.lines` prints; its `step_ms` is None where nothing is published of the devices, and where the
      program cannot be read.
    """
    chip = targets.attached_chip(program.mesh.devices.flat[0])
    step = Step(program, executable, held_bytes(state, batch))
    known = chip.memory_bandwidth is not None and chip.peak_flops(program.settings.model.dtype) is not None
    try:
        made = account(step, chip) if known else account_without_time(step, chip)
    except ValueError as error:
        _log.warning("the time of a step cannot be planned: %s", error)
        made = account_without_time(step, chip)
    run = dataclasses.replace(program.settings, total_steps=program.steps)
    return {**made, **of_run(run, made, program.mesh.size, jax.process_count(), None)}

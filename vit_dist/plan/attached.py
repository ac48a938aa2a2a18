"""The plan of a run that is about to begin, on the devices that are attached."""

import dataclasses
import logging
from collections.abc import Mapping

import jax

from vit_dist.plan import targets
from vit_dist.plan.analysis import Analysis, analysis_without_time, run_fields, step_analysis
from vit_dist.plan.compile import CompiledStep, held_bytes
from vit_dist.plan.report import lines
from vit_dist.program import Program
from vit_dist.step.state import State

# What reading the memory and cost of a compiled program can raise on an unknown backend.
_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip

_log = logging.getLogger(__name__)


def plan_lines(program: Program, state: State, batch: Mapping[str, jax.Array]) -> list[str]:
    """Compiles the training step and returns its memory and time in a few lines, none where they cannot be read."""
    executable = program.train_step.lower(state, batch).compile()  # cached for the next call
    try:
        return lines(plan_attached(program, executable, state, batch))
    except _ERRORS as error:  # a run does not need its plan
        _log.warning("no plan of this run can be made (%s: %s); it goes on", type(error).__name__, error)
        return []


def plan_attached(
    program: Program, executable: jax.stages.Compiled, state: State, batch: Mapping[str, jax.Array]
) -> Analysis:
    """Returns memory and time of a training step that was compiled for the attached devices.

    Args:
      program: the program that the step belongs to.
      executable: its compiled training step.
      state: the state that the run starts from.
      batch: a training batch; only its shapes and shardings are used.

    Returns:
      What `report.lines` prints. `step_ms` is None if no rates of the devices are published or the compiled program
      cannot be read.
    """
    chip = targets.attached_chip(program.mesh.devices.flat[0])
    step = CompiledStep(program, executable, held_bytes(state, batch))
    known = chip.memory_bandwidth is not None and chip.peak_flops(program.settings.model.dtype) is not None
    try:
        analysis = step_analysis(step, chip) if known else analysis_without_time(step, chip)
    except ValueError as error:
        _log.warning("the time of a step cannot be planned: %s", error)
        analysis = analysis_without_time(step, chip)
    settings = dataclasses.replace(program.settings, total_steps=program.steps)
    return {**analysis, **run_fields(settings, analysis, program.mesh.size, jax.process_count(), None)}

"""The real training step, compiled for devices that need not be here, from shapes alone; nothing runs."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vit_dist.config import Config, ConfigError
from vit_dist.data.pictures import augment
from vit_dist.data.sets.sources import is_in_memory
from vit_dist.describe import CLASSES, bytes_per_device
from vit_dist.program import UNUSED, Program
from vit_dist.step.state import State

# Where there is a GPU its compiler tries its own products and cuBLAS's, and takes the quicker. Without one it would
# take its own untried, in tiles that do not fit every shape.
_OPTIONS: dict[str, dict[str, str | bool]] = {"gpu": {"xla_gpu_enable_triton_gemm": False}}
_SIZE = r"([\d.]+)([KMGT]?)"
_NEEDS = re.compile(rf"memory required for HLO temporaries \({_SIZE}\)|Used {_SIZE} of {_SIZE} hbm", re.IGNORECASE)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled training step and what it was compiled from."""

    program: Program
    executable: jax.stages.Compiled
    held: dict[str, int]  # see `held_bytes`


class TooLarge(Exception):
    """The compiler found no way to fit a step into a device's memory.

    needed: how many bytes it would take; held: what of them a device holds before the step begins.
    """

    def __init__(self, needed: int, held: dict[str, int]):
        super().__init__(f"a device would need {needed} bytes")
        self.needed, self.held = needed, held


def make_program(settings: Config, devices: Sequence[jax.Device]) -> Program:
    """The program of a config on these devices, its batch checked against them. Raises `ConfigError`.

    The data stay closed: where the config leaves them open, there are `CLASSES` classes; a run in epochs has a length
    that changes nothing but a constant of the schedule.
    """
    whole = augment.on_device(settings.data, in_memory=is_in_memory(settings.data))
    steps = settings.total_steps or UNUSED
    program = Program(settings, classes=CLASSES, steps=steps, augment_on_device=whole, devices=devices)
    program.check_training_batch()
    if program.mesh.size < len(devices):
        raise ConfigError(
            f"mesh: takes {program.mesh.size} of the target's {len(devices)} devices; set one axis to -1, or take a "
            "smaller target"
        )
    return program


def compile_step(program: Program) -> Step:
    """Compiles the training step of a program. Raises `TooLarge`; `ConfigError` where the compiler fails otherwise."""
    with program.in_use():
        state, batch = program.abstract_state(), program.abstract_batch()
        held = held_bytes(state, batch)
        lowered = program.train_step.lower(state, batch)
        try:
            executable = lowered.compile(_OPTIONS.get(program.mesh.devices.flat[0].platform))
        except jax.errors.JaxRuntimeError as error:
            needed = _needed(str(error), sum(held.values()))
            if needed is not None:
                raise TooLarge(needed, held) from error
            raise ConfigError(
                f"XLA's compiler cannot make this program: {str(error).splitlines()[0]}; change the layout or the batch"
            ) from error
    return Step(program, executable, held)


def held_bytes(state: State, batch: Mapping[str, Any]) -> dict[str, int]:
    """Bytes that a device holds before a step begins: parameters, optimizer, ema, batch. Shapes will do for arrays."""
    parts = {"parameters": state.parameters, "optimizer": (state.optimizer, state.step), "ema": state.ema}
    parts["batch"] = dict(batch)
    return {name: sum(map(bytes_per_device, jax.tree.leaves(tree))) for name, tree in parts.items()}


def _needed(message: str, held: int) -> int | None:
    """The bytes that an error of the TPUs' compiler says the program takes; None where it says something else.

    held: what a device holds before the step, which the message leaves out when it speaks of temporaries.
    """
    found = _NEEDS.search(message) if "RESOURCE_EXHAUSTED" in message else None
    if found is None:
        return None
    temporaries, unit, used, used_unit = found.groups()[:4]
    if temporaries:
        return held + int(float(temporaries) * _UNITS[unit.upper()])
    return int(float(used) * _UNITS[used_unit.upper()])

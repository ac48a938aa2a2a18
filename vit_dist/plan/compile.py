"""Compiles the real training step from shapes alone, for devices that need not be attached. Nothing runs."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vit_dist.config import Config, ConfigError
from vit_dist.data.pictures import augment
from vit_dist.data.sets.sources import is_in_memory
from vit_dist.describe import CLASSES
from vit_dist.mesh import layout
from vit_dist.program import UNUSED, Program
from vit_dist.step.state import State

# With a GPU attached, XLA times its own matrix products (Triton) against cuBLAS's and takes the faster. Without one it
# would take its own untimed, with tile sizes that do not fit every shape.
_OPTIONS: dict[str, dict[str, str | bool]] = {"gpu": {"xla_gpu_enable_triton_gemm": False}}
_SIZE = r"([\d.]+)([KMGT]?)"
_NEEDS = re.compile(rf"memory required for HLO temporaries \({_SIZE}\)|Used {_SIZE} of {_SIZE} hbm", re.IGNORECASE)
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A compiled training step and the program that it belongs to."""

    program: Program
    executable: jax.stages.Compiled
    held: dict[str, int]  # see `held_bytes`


class TooLarge(Exception):
    """Raised if the compiler finds no way to fit a step into a device's memory.

    needed: the bytes that the step would take. held: those that a device holds before the step, by `held_bytes`.
    """

    def __init__(self, needed: int, held: dict[str, int]):
        super().__init__(f"a device would need {needed} bytes")
        self.needed, self.held = needed, held


def make_program(settings: Config, devices: Sequence[jax.Device]) -> Program:
    """Returns the program of a config on these devices.

    No data are opened: a config without `model.num_classes` gets `CLASSES` classes, and a run counted in epochs gets
    an arbitrary number of steps, which is only a constant in the schedule.

    Raises:
      ConfigError: the batch or the model does not divide over the mesh, or the mesh leaves devices idle.
    """
    on_device = augment.on_device(settings.data, in_memory=is_in_memory(settings.data))
    steps = settings.total_steps or UNUSED
    program = Program(settings, classes=CLASSES, steps=steps, augment_on_device=on_device, devices=devices)
    program.check_training_batch()
    if program.mesh.size < len(devices):
        raise ConfigError(
            f"mesh: takes {program.mesh.size} of the target's {len(devices)} devices; set one axis to -1, or take a "
            "smaller target"
        )
    return program


def compile_step(program: Program) -> CompiledStep:
    """Compiles the training step of a program. Raises `TooLarge`, or `ConfigError` if the compiler fails otherwise."""
    with program.in_use():
        state, batch = program.abstract_state(), program.abstract_batch()
        held = held_bytes(state, batch)
        lowered = program.train_step.lower(state, batch)
        try:
            executable = lowered.compile(_OPTIONS.get(program.mesh.devices.flat[0].platform))
        except jax.errors.JaxRuntimeError as error:
            needed = _needed_bytes(str(error), sum(held.values()))
            if needed is not None:
                raise TooLarge(needed, held) from error
            raise ConfigError(
                f"XLA's compiler cannot make this program: {str(error).splitlines()[0]}; change the layout or the batch"
            ) from error
    return CompiledStep(program, executable, held)


def held_bytes(state: State, batch: Mapping[str, Any]) -> dict[str, int]:
    """Returns the bytes that a device holds before a step, by use: parameters, optimizer, ema, batch.

    `state` and `batch` may hold arrays or `jax.ShapeDtypeStruct`s.
    """
    trees = {"parameters": state.parameters, "optimizer": (state.optimizer, state.step), "ema": state.ema}
    trees["batch"] = dict(batch)
    return {name: layout.bytes_per_device(tree) for name, tree in trees.items()}


def _needed_bytes(message: str, held: int) -> int | None:
    """Returns the bytes that a program needs by an error message of the TPU compiler; None for any other message.

    held: bytes that a device holds before the step, which a message about temporaries leaves out.
    """
    match = _NEEDS.search(message) if "RESOURCE_EXHAUSTED" in message else None
    if match is None:
        return None
    temporaries, unit, used, used_unit = match.groups()[:4]
    if temporaries:
        return held + int(float(temporaries) * _UNITS[unit.upper()])
    return int(float(used) * _UNITS[used_unit.upper()])

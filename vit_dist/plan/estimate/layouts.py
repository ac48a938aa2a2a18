"""Every layout that a config may have on a target: meshes of all its devices, and ways to run a step on each.

A layout is a mesh, `model.remat`, `model.scan` and micro-batches. What the run computes is the config's own, but for
the order of floating-point sums and, with micro-batches, the draws of dropout.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax

from vit_dist import config, recipes
from vit_dist.config import Config, ConfigError
from vit_dist.describe import CLASSES
from vit_dist.mesh import layout, topology
from vit_dist.model.vit import shape_of
from vit_dist.plan import roofline
from vit_dist.plan.estimate.step import Estimate, estimate, wires_of
from vit_dist.plan.estimate.workload import state_bytes_of
from vit_dist.plan.targets import Target
from vit_dist.program import check_model
from vit_dist.schema import flatten

# The deepest model whose blocks are tried unrolled. Of L/16, with 24, the GPUs' compiler makes a program in half a
# minute, and the TPUs' in more than two.
UNROLLED = {"gpu": 24, "tpu": 8, "cpu": 24}

_REMATS: tuple[Literal["none", "names", "block"], ...] = ("none", "names", "block")
_GATHERS: tuple[Literal["step", "microbatch"], ...] = ("step", "microbatch")


@dataclasses.dataclass(frozen=True)
class Layout:
    """One that divides: the config with it, and what arithmetic says of it."""

    settings: Config
    overrides: tuple[str, ...]  # `key=value` where it is not the config's own
    parts: int  # into how many the model and its activations are cut
    found: Estimate
    seconds: float | None  # of a step; None where the chip's rates are not known

    @property
    def cost(self) -> float:
        """What layouts are ranked by: seconds of a step, or arithmetic alone."""
        return self.found.work.flops if self.seconds is None else self.seconds

    @property
    def kind(self) -> tuple[Any, ...]:
        """What says where the estimate of memory may be wrong: layouts of one kind err alike."""
        model, several = self.settings.model, self.settings.accumulate_steps > 1
        return model.remat, model.scan, several, several and self.settings.accumulate_gather


def layouts(settings: Config, target: Target, devices: Sequence[jax.Device]) -> tuple[list[Layout], list[str]]:
    """The layouts that divide, the best first, and why the other meshes do not go, as `ConfigError` says it."""
    classes = settings.model.num_classes or CLASSES
    held = state_bytes_of(_with_classes(settings, classes))
    own = _own_sizes(settings, len(devices))
    found, refused = [], []
    for sizes in meshes(target):
        try:
            _check(_with_classes(settings, classes), sizes)
            wires = wires_of(topology.make_mesh(sizes, devices), target.chip)
        except ConfigError as error:
            refused.append(str(error))
            continue
        mesh = settings.mesh if sizes == own else config.Mesh(**sizes)
        for one in _ways(dataclasses.replace(settings, mesh=mesh), sizes, target.chip.platform):
            said = estimate(_with_classes(one, classes), target.chip, wires, held)
            seconds = roofline.step_seconds(said.work, target.chip, one.model.dtype)
            parts = sizes["fsdp"] * sizes["context"] * sizes["tensor"]
            found.append(Layout(one, _overrides(settings, one), parts, said, seconds))
    return _ranked(found), refused


def meshes(target: Target) -> Iterator[dict[str, int]]:
    """Axis sizes of every mesh of all devices of a target.

    TPU slices are replicas of each other, as the network between them asks; nodes may be, or not.
    """
    groups = {"tpu": (target.slices,), "gpu": (1, target.shape[0]), "cpu": (1,)}[target.chip.platform]
    for replicas in dict.fromkeys(groups):
        for data, fsdp, parts, tensor in _factors(target.count // replicas, 4):
            yield {"dcn_data": replicas, "data": data, "fsdp": fsdp, "context": parts, "tensor": tensor}


def _ranked(found: list[Layout]) -> list[Layout]:
    """The quickest first; of equal ones that with fewer micro-batches, fewer changes, fewer parts, less memory."""

    def order(one: Layout) -> tuple[Any, ...]:
        times, changes = one.settings.accumulate_steps, len(one.overrides)
        return one.cost, times, changes, one.parts, one.found.peak_bytes, one.overrides

    return sorted(found, key=order)


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as a product of so many, in order."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factors(number // first, count - 1))


def _check(settings: Config, sizes: dict[str, int]) -> None:
    """Raises `ConfigError` where the config's numbers do not divide over a mesh, as its program would."""
    layout.check_divides("batch_size", settings.batch_size, "batch", sizes)
    check_model(settings.model, sizes)


def _ways(settings: Config, sizes: dict[str, int], platform: str) -> Iterator[Config]:
    """The config on its mesh with every remat, scan and number of micro-batches."""
    model, rows = settings.model, settings.batch_size // math.prod(sizes[axis] for axis in layout.TABLE["batch"])
    shallow = shape_of(_with_classes(settings, CLASSES).model).depth <= UNROLLED[platform]
    scans = (True, False) if shallow or not model.scan else (True,)
    asked = {2**power for power in range(rows.bit_length())} | {settings.accumulate_steps}
    for times in sorted(times for times in asked if rows % times == 0):
        gathers = _GATHERS if times > 1 and sizes["fsdp"] > 1 else (settings.accumulate_gather,)
        for gather in gathers:
            for remat in _REMATS:
                for scan in scans:
                    yield dataclasses.replace(
                        settings,
                        model=dataclasses.replace(model, remat=remat, scan=scan),
                        accumulate_steps=times,
                        accumulate_gather=gather,
                    )


def _own_sizes(settings: Config, devices: int) -> dict[str, int] | None:
    """The axis sizes of the config's own mesh; None where it cannot be had."""
    try:
        return topology.axis_sizes(settings.mesh, devices)
    except ConfigError:
        return None


def _overrides(settings: Config, changed: Config) -> tuple[str, ...]:
    flat = {
        **{f"mesh.{axis}": size for axis, size in dataclasses.asdict(changed.mesh).items()},
        "model.remat": changed.model.remat,
        "model.scan": changed.model.scan,
        "accumulate_steps": changed.accumulate_steps,
        "accumulate_gather": changed.accumulate_gather,
    }
    own = flatten(dataclasses.asdict(settings))
    differing = ((key, value) for key, value in flat.items() if own[key] != value)
    return tuple(recipes.assignment(key, value) for key, value in differing)


def _with_classes(settings: Config, classes: int) -> Config:
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, num_classes=classes))

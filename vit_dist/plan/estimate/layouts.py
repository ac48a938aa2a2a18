"""Enumerates the layouts of a config on a target, each with its estimate.

A layout is a mesh of all devices, `model.remat`, `model.scan` and the micro-batches. Another layout computes the same
as the config, except for the order of floating-point sums and, with micro-batches, the random draws of dropout.
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
from vit_dist.model.choices import UNROLLED_DEPTH
from vit_dist.model.shape import shape_of
from vit_dist.plan import roofline
from vit_dist.plan.estimate.step import Estimate, estimate, mesh_links
from vit_dist.plan.estimate.workload import state_bytes
from vit_dist.plan.targets import Target
from vit_dist.program import check_model
from vit_dist.schema import flatten

_REMATS: tuple[Literal["none", "names", "block"], ...] = ("none", "names", "block")
_GATHERS: tuple[Literal["step", "microbatch"], ...] = ("step", "microbatch")


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout over which the config divides."""

    settings: Config  # the config with this layout
    overrides: tuple[str, ...]  # `key=value` where it differs from the config
    shards: int  # of the model and its activations: the devices of fsdp, context and tensor
    estimate: Estimate
    seconds: float | None  # likely time of a step; None if the chip's rates are unknown

    @property
    def score(self) -> float:
        """What layouts are ranked by, less is better: the seconds of a step, or its FLOPs if they are unknown."""
        return self.estimate.cost.flops if self.seconds is None else self.seconds

    @property
    def kind(self) -> tuple[Any, ...]:
        """The settings that the error of the memory estimate depends on: layouts of one kind have a similar error."""
        model, several = self.settings.model, self.settings.accumulate_steps > 1
        return model.remat, model.scan, several, several and self.settings.accumulate_gather


def layouts(settings: Config, target: Target, devices: Sequence[jax.Device]) -> tuple[list[Layout], list[str]]:
    """Returns the layouts over which the config divides, the best first, and the `ConfigError` of every other mesh."""
    classes = settings.model.num_classes or CLASSES
    state = state_bytes(_with_classes(settings, classes))
    own_sizes = _own_sizes(settings, len(devices))
    candidates, refused = [], []
    for sizes in meshes(target):
        try:
            _check(_with_classes(settings, classes), sizes)
            links = mesh_links(topology.make_mesh(sizes, devices), target.chip)
        except ConfigError as error:
            refused.append(str(error))
            continue
        mesh = settings.mesh if sizes == own_sizes else config.Mesh(**sizes)
        shards = sizes["fsdp"] * sizes["context"] * sizes["tensor"]
        for changed in _step_variants(dataclasses.replace(settings, mesh=mesh), sizes, target.chip.platform):
            estimated = estimate(_with_classes(changed, classes), target.chip, links, state)
            seconds = roofline.step_seconds(estimated.cost, target.chip, changed.model.dtype)
            candidates.append(Layout(changed, _overrides(settings, changed), shards, estimated, seconds))
    return _ranked(candidates), refused


def meshes(target: Target) -> Iterator[dict[str, int]]:
    """Yields the axis sizes of every mesh of all devices of a target.

    TPU slices are always replicas of each other, because the network between them is slow; GPU nodes may be.
    """
    groups = {"tpu": (target.slices,), "gpu": (1, target.shape[0]), "cpu": (1,)}[target.chip.platform]
    for replicas in dict.fromkeys(groups):
        for data, fsdp, context, tensor in _factors(target.count // replicas, 4):
            yield {"dcn_data": replicas, "data": data, "fsdp": fsdp, "context": context, "tensor": tensor}


def _ranked(candidates: list[Layout]) -> list[Layout]:
    """Returns the fastest first; of equals, that with fewer micro-batches, changes, shards and bytes."""

    def order(layout: Layout) -> tuple[Any, ...]:
        micro_batches, changes = layout.settings.accumulate_steps, len(layout.overrides)
        return layout.score, micro_batches, changes, layout.shards, layout.estimate.peak_bytes, layout.overrides

    return sorted(candidates, key=order)


def _factors(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Yields every ordered product of `count` positive integers that equals `number`."""
    if count == 1:
        yield (number,)
        return
    for first in range(1, number + 1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factors(number // first, count - 1))


def _check(settings: Config, sizes: dict[str, int]) -> None:
    """Raises `ConfigError` if the config does not divide over a mesh, as its program would."""
    layout.check_divides("batch_size", settings.batch_size, "batch", sizes)
    check_model(settings.model, sizes)


def _step_variants(settings: Config, sizes: dict[str, int], platform: str) -> Iterator[Config]:
    """Yields the config with every remat, scan and number of micro-batches."""
    model, rows = settings.model, settings.batch_size // math.prod(sizes[axis] for axis in layout.TABLE["batch"])
    shallow = shape_of(_with_classes(settings, CLASSES).model).depth <= UNROLLED_DEPTH[platform]
    scans = (True, False) if shallow or not model.scan else (True,)
    counts = {2**power for power in range(rows.bit_length())} | {settings.accumulate_steps}
    for micro_batches in sorted(count for count in counts if rows % count == 0):
        gathers = _GATHERS if micro_batches > 1 and sizes["fsdp"] > 1 else (settings.accumulate_gather,)
        for gather in gathers:
            for remat in _REMATS:
                for scan in scans:
                    yield dataclasses.replace(
                        settings,
                        model=dataclasses.replace(model, remat=remat, scan=scan),
                        accumulate_steps=micro_batches,
                        accumulate_gather=gather,
                    )


def _own_sizes(settings: Config, devices: int) -> dict[str, int] | None:
    """Returns the axis sizes of the config's own mesh; None if the devices do not divide over it."""
    try:
        return topology.axis_sizes(settings.mesh, devices)
    except ConfigError:
        return None


def _overrides(settings: Config, changed: Config) -> tuple[str, ...]:
    layout_values = {
        **{f"mesh.{axis}": size for axis, size in dataclasses.asdict(changed.mesh).items()},
        "model.remat": changed.model.remat,
        "model.scan": changed.model.scan,
        "accumulate_steps": changed.accumulate_steps,
        "accumulate_gather": changed.accumulate_gather,
    }
    own = flatten(dataclasses.asdict(settings))
    differing = ((key, value) for key, value in layout_values.items() if own[key] != value)
    return tuple(recipes.assignment(key, value) for key, value in differing)


def _with_classes(settings: Config, classes: int) -> Config:
    return dataclasses.replace(settings, model=dataclasses.replace(settings.model, num_classes=classes))

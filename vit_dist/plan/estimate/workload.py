"""Computes one device's share of a training step on a mesh of given sizes, from shapes and names of dimensions."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from vit_dist.config import Config
from vit_dist.mesh import layout
from vit_dist.mesh.topology import AXES
from vit_dist.model import context, kernels
from vit_dist.model.saved import LocalShape
from vit_dist.model.shape import Shape, shape_of
from vit_dist.plan.arithmetic import Sizes, attention_implementation, device_count
from vit_dist.plan.targets import Chip
from vit_dist.program import UNUSED
from vit_dist.step import trained
from vit_dist.step.optimizer import make_optimizer
from vit_dist.step.state import ModelFunction, make_state

Axes = tuple[str, ...]

# A block's norms and LayerScales. Dense layers fold them into their kernels as stored, so no device gathers them.
FOLDED = ("norm1", "norm2", "scale1", "scale2")


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of a config's state by the mesh axes that split them; valid for any sizes of these axes."""

    blocks: Mapping[Axes, int]  # float32 parameters inside the blocks
    folded: Mapping[Axes, int]  # those of them that are folded into kernels: see `FOLDED`
    others: Mapping[Axes, int]  # float32 parameters outside the blocks
    optimizer: Mapping[Axes, int]
    ema: Mapping[Axes, int]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one device computes in a step: `rows` examples in each micro-batch."""

    settings: Config
    shape: Shape
    sizes: Sizes
    state: StateBytes
    platform: str
    attention: str  # as `attention_implementation` names it
    local: LocalShape  # of an example's activations on the device
    rows: float

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches in a step."""
        return self.settings.accumulate_steps

    @property
    def itemsize(self) -> int:
        """The bytes of a number in the dtype of the model's arithmetic."""
        return 2 if self.settings.model.dtype == "bfloat16" else 4

    @property
    def gathers_once(self) -> bool:
        """Whether parameters are gathered once a step for several micro-batches."""
        per_step = self.settings.accumulate_gather == "step"
        return per_step and self.micro_batches > 1 and self.sizes.get("fsdp", 1) > 1

    def device_bytes(self, sizes_by_axes: Mapping[Axes, int]) -> float:
        """Returns the bytes that one device holds of a field of `state`."""
        return sum(size / device_count(self.sizes, axes) for axes, size in sizes_by_axes.items())

    def gathered_bytes(self, sizes_by_axes: Mapping[Axes, int]) -> float:
        """Returns the bytes that one device holds of a field of `state` after gathering it over `fsdp`."""
        return sum(size / device_count({**self.sizes, "fsdp": 1}, axes) for axes, size in sizes_by_axes.items())


def state_bytes(settings: Config) -> StateBytes:
    """Returns the bytes of a config's state, `model.num_classes` filled in, without running or allocating anything."""
    if trained.cuts_blocks(settings):  # of stacked blocks all are trained
        settings = dataclasses.replace(settings, init=dataclasses.replace(settings.init, freeze="none"))
    model = ModelFunction(dataclasses.replace(settings.model, scan=True), settings.lora)
    rules = trained.rules_of(settings)
    optimizer = make_optimizer(settings.optimizer, UNUSED, rules=rules, depth=shape_of(settings.model).depth)
    mesh = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    # jax does not replace a mesh in use by one of another size, so an empty one comes in between.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())), jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(lambda: make_state(model, optimizer, settings.seed, settings.ema_decay > 0))
    blocks = state.parameters["blocks"]
    folded = {name: tree for name, tree in blocks.items() if name in FOLDED}
    others = {name: tree for name, tree in state.parameters.items() if name != "blocks"}
    return StateBytes(*(_by_axes(tree) for tree in (blocks, folded, others, (state.optimizer, state.step), state.ema)))


def device_workload(settings: Config, chip: Chip, sizes: Sizes, state: StateBytes) -> Workload:
    """Returns the share of one device.

    Args:
      settings: the config, `model.num_classes` filled in; its numbers divide over the mesh.
      chip: the kind of device.
      sizes: the mesh.
      state: `state_bytes(settings)`.
    """
    shape = shape_of(settings.model)
    tensor, shards = device_count(sizes, layout.TABLE["heads"]), device_count(sizes, layout.TABLE["tokens"])
    if shards > 1:
        tokens = context.padded_length(shape.tokens, shards) // shards
    else:
        tokens = kernels.padded_length(settings.model, chip.platform, chip.kind, head_shards=tensor)
    local = LocalShape(
        tokens=tokens,
        width=shape.width,
        heads=shape.heads // tensor,
        head_size=shape.width // shape.heads,
        hidden=shape.mlp // tensor,
        tiled=chip.platform == "tpu",
    )
    attention = attention_implementation(settings, chip, sizes)
    rows = settings.batch_size / device_count(sizes, layout.TABLE["batch"]) / settings.accumulate_steps
    return Workload(settings, shape, sizes, state, chip.platform, attention, local, rows)


def _by_axes(tree: Any) -> dict[Axes, int]:
    sizes: Counter[Axes] = Counter()
    for leaf in jax.tree.leaves(tree):
        spec = leaf.sharding.spec if leaf.sharding is not None else ()
        names = tuple(name for axes in spec if axes for name in (axes if isinstance(axes, tuple) else (axes,)))
        sizes[names] += math.prod(leaf.shape) * leaf.dtype.itemsize
    return dict(sizes)

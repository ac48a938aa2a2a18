"""One device's share of a training step on a mesh of given sizes, by arithmetic on shapes and names of dimensions."""

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
from vit_dist.model import context
from vit_dist.model.vit import Shape, shape_of
from vit_dist.plan.arithmetic import Sizes, attention_of, device_count
from vit_dist.plan.estimate.activations import LocalShape
from vit_dist.program import UNUSED
from vit_dist.step.optimizer import make_optimizer
from vit_dist.step.state import ModelFunction, make_state

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of a config's state by the axes of the mesh that split them, whatever their sizes.

    blocks and others: the parameters inside and outside of the blocks, which are float32.
    """

    blocks: Mapping[Axes, int]
    others: Mapping[Axes, int]
    optimizer: Mapping[Axes, int]
    ema: Mapping[Axes, int]


@dataclasses.dataclass(frozen=True)
class Workload:
    """What one device has to do in a step: `rows` examples in each of `settings.accumulate_steps` micro-batches."""

    settings: Config
    shape: Shape
    sizes: Sizes
    held: StateBytes
    platform: str
    attention: str  # what computes it: "xla", "cudnn" or "chunked" (`model.context`)
    part: LocalShape  # of an example's activations
    rows: float

    @property
    def times(self) -> int:
        """Micro-batches of a step."""
        return self.settings.accumulate_steps

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the dtype of the arithmetic."""
        return 2 if self.settings.model.dtype == "bfloat16" else 4

    @property
    def gathers_once(self) -> bool:
        """Whether parameters are gathered once a step for several micro-batches."""
        once = self.settings.accumulate_gather == "step"
        return once and self.times > 1 and self.sizes.get("fsdp", 1) > 1

    def own(self, parts: Mapping[Axes, int]) -> float:
        """The bytes of a part of `held` that one device has."""
        return sum(size / device_count(self.sizes, axes) for axes, size in parts.items())

    def gathered(self, parts: Mapping[Axes, int]) -> float:
        """The bytes of these parameters whole over `fsdp`, still float32."""
        return sum(size / device_count({**self.sizes, "fsdp": 1}, axes) for axes, size in parts.items())


def state_bytes_of(settings: Config) -> StateBytes:
    """The state of a config, `model.num_classes` filled in, on any mesh: its shapes are traced once, on one of ones."""
    model = ModelFunction(dataclasses.replace(settings.model, scan=True))
    optimizer = make_optimizer(settings.optimizer, UNUSED)
    anywhere = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    # A mesh in use cannot be step_collectives for one of another size, but left.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())), jax.sharding.use_abstract_mesh(anywhere):
        state = jax.eval_shape(lambda: make_state(model, optimizer, settings.seed, settings.ema_decay > 0))
    blocks = state.parameters["blocks"]
    others = {name: tree for name, tree in state.parameters.items() if name != "blocks"}
    return StateBytes(*(_by_axes(tree) for tree in (blocks, others, (state.optimizer, state.step), state.ema)))


def workload_of(settings: Config, platform: str, sizes: Sizes, held: StateBytes) -> Workload:
    """A device's share; the config's numbers divide over the mesh."""
    shape = shape_of(settings.model)
    tensor, parts = device_count(sizes, layout.TABLE["heads"]), device_count(sizes, layout.TABLE["tokens"])
    part = LocalShape(
        tokens=context.padded_length(shape.tokens, parts) // parts if parts > 1 else shape.tokens,
        width=shape.width,
        heads=shape.heads // tensor,
        head_size=shape.width // shape.heads,
        hidden=shape.mlp // tensor,
        tiled=platform == "tpu",
    )
    attention = attention_of(settings, platform, sizes)
    rows = settings.batch_size / device_count(sizes, layout.TABLE["batch"]) / settings.accumulate_steps
    return Workload(settings, shape, sizes, held, platform, attention, part, rows)


def _by_axes(tree: Any) -> dict[Axes, int]:
    found: Counter[Axes] = Counter()
    for leaf in jax.tree.leaves(tree):
        own = leaf.sharding.spec if leaf.sharding is not None else ()
        names = tuple(name for axes in own if axes for name in (axes if isinstance(axes, tuple) else (axes,)))
        found[names] += math.prod(leaf.shape) * leaf.dtype.itemsize
    return dict(found)

"""Memory and work of one layout by arithmetic alone: what a search ranks thousands of layouts by, without a compiler.

What a device holds follows exactly from the shapes of the state and the names of their dimensions; what a block keeps
for its backward pass, from `activations`. The rest of a step's temporaries and what moves through memory are estimated
with the constants below, each of which was found once, on the programs that XLA's compilers made of L/16, g/14, B/16
and 22B for H200, v5e and v5p. The compiler has the last word.
"""

import dataclasses
import math
from collections.abc import Mapping

from jax.sharding import Mesh

from vit_dist.config import Config, pair
from vit_dist.mesh import layout
from vit_dist.model.context import CHUNK
from vit_dist.plan import links
from vit_dist.plan.arithmetic import Sizes, device_count, device_flops
from vit_dist.plan.estimate.activations import Kept, kept, kept_bytes
from vit_dist.plan.estimate.communication import FLOAT32, step_collectives
from vit_dist.plan.estimate.workload import Axes, StateBytes, Workload, workload_of
from vit_dist.plan.roofline import Cost, transfer
from vit_dist.plan.targets import Chip

# What one block's backward pass has at once besides what was kept, in the dtype of the arithmetic: queries, keys,
# values and output and their gradients; the hidden units before and after the activation and their gradient; gradients
# of its input and output. These are there in float32, too.
WORKSPACE = {"heads": 8, "hidden": 3, "width": 2}
WHOLE_COPIES = 3  # of the blocks' parameters in float32 with accumulate_gather=step: two sums of gradients and a third
LOGITS = 3  # float32 arrays of a number for each class and example: logits, targets, gradients

# How often a block moves an array like its input through memory between its products, there and back; how often an
# array that it keeps is moved, into the stack over blocks and out of it. A TPU's compiler fuses most of it with
# products and keeps arrays on the chip.
PASSES = {"gpu": 118, "tpu": 30, "cpu": 118}
STACKED = {"gpu": 4.0, "tpu": 1.2, "cpu": 4.0}
SPLIT = 0.6  # of these passes, the share that a tensor group splits


@dataclasses.dataclass(frozen=True)
class Wires:
    """A mesh as one device sees it: its axes and sizes, and the wire, by name and bytes/s, that some talk over."""

    sizes: Sizes
    links: Mapping[Axes, tuple[str, float | None]]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """memory: bytes on one device by what they are for. work: of one device in a step."""

    memory: dict[str, int]
    work: Cost

    @property
    def peak_bytes(self) -> int:
        """Bytes at the worst moment of a step."""
        return sum(self.memory.values())


def wires_of(mesh: Mesh, chip: Chip) -> Wires:
    """The wires of a mesh of these chips."""
    batch, width = layout.TABLE["batch"], layout.TABLE["width"]
    replicas = tuple(axis for axis in batch if axis not in width)
    spoken = (batch, replicas, width, layout.TABLE["tokens"], layout.TABLE["heads"])
    groups = {tuple(axis for axis in axes if axis in mesh.shape) for axes in spoken}
    return Wires(dict(mesh.shape), {axes: links.link(chip, links.group(mesh, axes)) for axes in groups})


def estimate(settings: Config, chip: Chip, wires: Wires, held: StateBytes) -> Estimate:
    """Memory and work of a config's training step on a mesh that its numbers divide over.

    settings: with `model.num_classes` filled in. held: `state_bytes_of(settings)`, whatever its mesh, batch, remat and
    scan.
    """
    load = workload_of(settings, chip.platform, wires.sizes, held)
    other = _update_bytes(load) + _between_products(load)
    model = load.settings.model
    transfers = (
        transfer(one, device_count(load.sizes, one.axes), wires.links[one.axes], model, load.times)
        for one in step_collectives(load)
    )
    work = Cost(
        flops=device_flops(settings, load.attention, load.sizes),
        bytes=other + _product_bytes(load),
        other_bytes=other,
        transfers=tuple(one for one in transfers if one is not None),
    )
    return Estimate({name: round(size) for name, size in _memory(load).items()}, work)


def _memory(load: Workload) -> dict[str, float]:
    """Bytes by what they are for at the worst moment, which is early in the backward pass.

    parameters, optimizer, ema, batch are exact. activations: what all blocks keep; a GPU's compiler begins a
    micro-batch before the last is done where it can gather parameters ahead. gathered: blocks' parameters in the dtype
    of the arithmetic, whole where the backward pass keeps them, else cast once, as they lie. gradients: float32, as
    parameters lie, twice where they are summed. head: its kernel whole, float32, with its gradient; logits. workspace:
    see above.
    """
    model, held, pixels = load.settings.model, load.held, _pixels(load)
    own = load.own(held.blocks) + load.own(held.others)
    images = load.rows * load.times
    gradients = own * min(2, load.times)
    gathered = _kept_parameters(load) if model.remat == "none" else _cast_parameters(load)
    if load.gathers_once:
        whole = load.gathered(held.blocks)
        gradients += WHOLE_COPIES * whole
        gathered += whole * load.itemsize / FLOAT32
    gathers_often = load.times > 1 and load.sizes.get("fsdp", 1) > 1 and not load.gathers_once
    two_at_once = load.platform == "gpu" and gathers_often
    head = (model.pre_logits or load.shape.width) * load.shape.classes
    return {
        "parameters": own,
        "optimizer": load.own(held.optimizer),
        "ema": load.own(held.ema),
        "batch": images * (pixels + 8),  # a byte each; a label and a number in 4 each
        "activations": _kept(load) * (2 if two_at_once else 1),
        "gathered": gathered,
        "gradients": gradients,
        "head": 2 * FLOAT32 * head + LOGITS * FLOAT32 * load.rows * load.shape.classes,
        "workspace": load.rows * _workspace(load) + images * pixels * load.itemsize,
    }


def _kept(load: Workload) -> float:
    """Bytes that all blocks keep of one micro-batch."""
    model = load.settings.model
    return load.shape.depth * load.rows * kept_bytes(kept(model, load.attention), load.part)


def _kept_parameters(load: Workload) -> float:
    """Bytes of all blocks' parameters as they meet the activations, where the backward pass finds them as they were."""
    whole = load.gathered(load.held.blocks) * load.itemsize / FLOAT32
    made = load.itemsize < FLOAT32 or load.sizes.get("fsdp", 1) > 1  # otherwise they are the parameters themselves
    return whole if made else 0.0


def _cast_parameters(load: Workload) -> float:
    return load.own(load.held.blocks) * load.itemsize / FLOAT32 if load.itemsize < FLOAT32 else 0.0


def _workspace(load: Workload) -> float:
    """Bytes that one block has at once for one example."""
    part = load.part
    arrays = [Kept(kind, load.itemsize, number) for kind, number in WORKSPACE.items()]
    size = kept_bytes([*arrays, Kept("width", FLOAT32, WORKSPACE["width"])], part)
    if load.attention == "xla":  # the weights, as the softmax gives them and as they meet the values
        return size + part.elements("weights") * (FLOAT32 + load.itemsize)
    if load.attention == "chunked":
        return size + part.heads * part.tokens * min(CHUNK, part.tokens) * (FLOAT32 + load.itemsize)
    return size


def _update_bytes(load: Workload) -> float:
    """Moved by the optimizer: the state is read and written; gradients are written, and read for a norm and for use."""
    held = load.held
    own = load.own(held.blocks) + load.own(held.others)
    return 2 * (own + load.own(held.optimizer) + load.own(held.ema)) + 3 * own


def _between_products(load: Workload) -> float:
    """Moved between products: see `PASSES`. What is kept of blocks that no loop runs is written and read in place."""
    tensor, platform = load.sizes.get("tensor", 1), load.platform
    tokens = load.shape.depth * load.rows * load.part.tokens * load.shape.width * load.itemsize
    passes = PASSES[platform] * (1 - SPLIT + SPLIT / tensor) * tokens
    stacked = _kept(load) + (_kept_parameters(load) if load.settings.model.remat == "none" else 0.0)
    return load.times * (passes + (STACKED[platform] if load.settings.model.scan else 1.0) * stacked)


def _product_bytes(load: Workload) -> float:
    """Moved by the blocks' products: operands read and results written, once forward, twice backward."""
    part, again = load.part, int(load.settings.model.remat == "block")
    hidden = part.hidden * (3 if load.shape.activation == "swiglu" else 2)
    wide, heads = 4 * part.width, 8 * part.heads * part.head_size
    acts = load.rows * part.tokens * (wide + heads + hidden)
    whole = load.gathered(load.held.blocks) / FLOAT32
    return load.times * (3 + again) * load.itemsize * (load.shape.depth * acts + whole)


def _pixels(load: Workload) -> int:
    """Numbers of an image."""
    return math.prod(pair(load.settings.model.image_size)) * load.shape.channels

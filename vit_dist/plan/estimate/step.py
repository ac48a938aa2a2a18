"""Estimates memory and cost of one layout without a compiler, so that a search can rank thousands of layouts.

The bytes of the state on a device follow exactly from its shapes and the names of their dimensions, and those that a
block saves for its backward pass from `activations`. The other temporaries and the bytes moved through memory are
estimated with the constants below. Each was fitted once to the programs that XLA's compilers made of L/16, g/14, B/16
and 22B for H200, v5e and v5p. The search compiles the best layouts, and the compiler's figures replace the estimate.
"""

import dataclasses
import math
from collections.abc import Mapping

from jax.sharding import Mesh

from vit_dist.config import Config, pair
from vit_dist.mesh import layout
from vit_dist.model.context import CHUNK
from vit_dist.model.saved import Saved, saved_arrays, saved_bytes
from vit_dist.plan.arithmetic import Sizes, device_count, device_flops
from vit_dist.plan.estimate.communication import FLOAT32, step_collectives
from vit_dist.plan.estimate.workload import Axes, StateBytes, Workload, device_workload
from vit_dist.plan.links import Link, group, slowest_link
from vit_dist.plan.roofline import Cost, transfer
from vit_dist.plan.targets import Chip

# The arrays that the backward pass of one block holds at once besides the saved ones, in the compute dtype.
# heads: queries, keys, values, output and the gradient of each. hidden: before and after the activation, and a
# gradient. width: the gradients of input and output, of which there is also a float32 copy.
WORKSPACE = {"heads": 8, "hidden": 3, "width": 2}
GATHERED_COPIES = 3  # float32 arrays as large as all gathered blocks that accumulate_gather=step needs for gradients
LOGITS = 3  # float32 arrays [examples, classes]: logits, targets, gradients

# PASSES: how often a block reads or writes an array of the size of its input outside of matrix products. STACK_PASSES:
# how often it reads or writes each saved array, to put it into the stack over blocks and to take it out. The TPU
# compiler fuses most of these with products, and keeps arrays on the chip.
PASSES = {"gpu": 118, "tpu": 30, "cpu": 118}
STACK_PASSES = {"gpu": 4.0, "tpu": 1.2, "cpu": 4.0}
TENSOR_SHARE = 0.6  # share of PASSES that a tensor group splits


@dataclasses.dataclass(frozen=True)
class MeshLinks:
    """The sizes of a mesh and the links that its collectives use."""

    sizes: Sizes
    by_axes: Mapping[Axes, Link]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated memory and cost of a step on one device."""

    memory: dict[str, int]  # bytes by use
    cost: Cost

    @property
    def peak_bytes(self) -> int:
        """The bytes at the peak of a step."""
        return sum(self.memory.values())


def mesh_links(mesh: Mesh, chip: Chip) -> MeshLinks:
    """Returns the links of a mesh of these chips."""
    batch, width = layout.TABLE["batch"], layout.TABLE["width"]
    replicas = tuple(axis for axis in batch if axis not in width)
    collectives_over = (batch, replicas, width, layout.TABLE["tokens"], layout.TABLE["heads"])
    groups = {tuple(axis for axis in axes if axis in mesh.shape) for axes in collectives_over}
    return MeshLinks(dict(mesh.shape), {axes: slowest_link(chip, group(mesh, axes)) for axes in groups})


def estimate(settings: Config, chip: Chip, links: MeshLinks, state: StateBytes) -> Estimate:
    """Returns the estimated memory and cost of a config's training step.

    Args:
      settings: the config, `model.num_classes` filled in; its numbers divide over the mesh.
      chip: the kind of device.
      links: the mesh and its links. The config's own mesh is ignored.
      state: `state_bytes(settings)`, which does not depend on mesh, batch, remat and scan.
    """
    work = device_workload(settings, chip, links.sizes, state)
    other_bytes = _update_bytes(work) + _elementwise_bytes(work)
    transfers = (
        transfer(
            collective,
            device_count(work.sizes, collective.axes),
            links.by_axes[collective.axes],
            settings.model,
            work.micro_batches,
        )
        for collective in step_collectives(work)
    )
    cost = Cost(
        flops=device_flops(settings, work.attention, work.sizes),
        bytes=other_bytes + _product_bytes(work),
        other_bytes=other_bytes,
        transfers=tuple(transfer for transfer in transfers if transfer is not None),
    )
    return Estimate({name: round(size) for name, size in _memory(work).items()}, cost)


def _memory(work: Workload) -> dict[str, float]:
    """Returns bytes by use at the peak of a step, which is early in the backward pass.

    - parameters, optimizer, ema, batch: exact.
    - activations: what all blocks save of one micro-batch.
    - gathered: copies of the blocks' parameters in the compute dtype: with `remat="none"` of all blocks in full, since
      the backward pass keeps them, otherwise of the device's own shard.
    - gradients: float32, sharded like the parameters; twice if micro-batches are summed.
    - head: its gathered kernel and gradient in float32; logits.
    - workspace: see `WORKSPACE`; the images in the compute dtype.
    """
    model, state, pixels = work.settings.model, work.state, _pixels(work)
    parameters = work.device_bytes(state.blocks) + work.device_bytes(state.others)
    images = work.rows * work.micro_batches
    gradients = parameters * min(2, work.micro_batches)
    gathered = _saved_parameters(work) if model.remat == "none" else _cast_parameters(work)
    if work.gathers_once:
        blocks = work.gathered_bytes(state.blocks)
        gradients += GATHERED_COPIES * blocks
        gathered += blocks * work.itemsize / FLOAT32
    head = (model.pre_logits or work.shape.width) * work.shape.classes
    return {
        "parameters": parameters,
        "optimizer": work.device_bytes(state.optimizer),
        "ema": work.device_bytes(state.ema),
        "batch": images * (pixels + 8),  # uint8 pixels; label and id are int32
        "activations": _saved_activations(work),
        "gathered": gathered,
        "gradients": gradients,
        "head": 2 * FLOAT32 * head + LOGITS * FLOAT32 * work.rows * work.shape.classes,
        "workspace": work.rows * _workspace(work) + images * pixels * work.itemsize,
    }


def _saved_activations(work: Workload) -> float:
    """Returns the bytes that all blocks save of one micro-batch."""
    model = work.settings.model
    exchanged = work.sizes.get("context", 1) > 1 and model.context_attention == "all_to_all"
    arrays = saved_arrays(model, work.attention, exchanged=exchanged)
    return work.shape.depth * work.rows * saved_bytes(arrays, work.local)


def _saved_parameters(work: Workload) -> float:
    """Returns the bytes of all blocks' cast and gathered parameters, which `remat="none"` saves."""
    is_copy = work.itemsize < FLOAT32 or work.sizes.get("fsdp", 1) > 1
    return work.gathered_bytes(work.state.blocks) * work.itemsize / FLOAT32 if is_copy else 0.0


def _cast_parameters(work: Workload) -> float:
    is_copy = work.itemsize < FLOAT32
    return work.device_bytes(work.state.blocks) * work.itemsize / FLOAT32 if is_copy else 0.0


def _workspace(work: Workload) -> float:
    """Returns the bytes of the workspace of one block for one example."""
    local = work.local
    arrays = [Saved(kind, work.itemsize, count) for kind, count in WORKSPACE.items()]
    size = saved_bytes([*arrays, Saved("width", FLOAT32, WORKSPACE["width"])], local)
    if work.attention == "xla":  # the attention weights in float32 and cast
        return size + local.elements("weights") * (FLOAT32 + work.itemsize)
    if work.attention == "chunked":
        return size + local.heads * local.tokens * min(CHUNK, local.tokens) * (FLOAT32 + work.itemsize)
    return size


def _update_bytes(work: Workload) -> float:
    """Returns the bytes that the optimizer moves: it reads and writes the state, and gradients pass memory three times.

    Gradients are written, read for their norm, and read for the update.
    """
    state = work.state
    parameters = work.device_bytes(state.blocks) + work.device_bytes(state.others)
    return 2 * (parameters + work.device_bytes(state.optimizer) + work.device_bytes(state.ema)) + 3 * parameters


def _elementwise_bytes(work: Workload) -> float:
    """Returns the bytes that blocks move outside of matrix products: see `PASSES`. Unrolled blocks have no stack."""
    tensor, platform = work.sizes.get("tensor", 1), work.platform
    tokens = work.shape.depth * work.rows * work.local.tokens * work.shape.width * work.itemsize
    passes = PASSES[platform] * (1 - TENSOR_SHARE + TENSOR_SHARE / tensor) * tokens
    saved = _saved_activations(work) + (_saved_parameters(work) if work.settings.model.remat == "none" else 0.0)
    return work.micro_batches * (passes + (STACK_PASSES[platform] if work.settings.model.scan else 1.0) * saved)


def _product_bytes(work: Workload) -> float:
    """Returns the bytes that the blocks' matrix products read and write, once forward and twice backward."""
    local, recomputed = work.local, int(work.settings.model.remat == "block")
    hidden = local.hidden * (3 if work.shape.activation == "swiglu" else 2)
    width, heads = 4 * local.width, 8 * local.heads * local.head_size
    activations = work.rows * local.tokens * (width + heads + hidden)
    parameters = work.gathered_bytes(work.state.blocks) / FLOAT32
    return work.micro_batches * (3 + recomputed) * work.itemsize * (work.shape.depth * activations + parameters)


def _pixels(work: Workload) -> int:
    """Returns the numbers in an image."""
    return math.prod(pair(work.settings.model.image_size)) * work.shape.channels

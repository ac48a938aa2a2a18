"""Estimates the collectives of a training step, from the layout alone.

Compilers differ at times: the TPU compiler turns some reduce-scatters into all-reduces, which send twice as much, and
combines sums over `context` and `fsdp`. Sums of a few numbers are left out.
"""

import math
from collections.abc import Iterator, Mapping

from vit_dist.config import pair
from vit_dist.mesh import layout
from vit_dist.plan.arithmetic import device_count
from vit_dist.plan.collectives import Collective
from vit_dist.plan.estimate.workload import Axes, Workload
from vit_dist.step.augment import partners_are_local

FLOAT32 = 4


def step_collectives(work: Workload) -> list[Collective]:
    """Returns the collectives of one step. Mesh axes of size 1 are left out."""
    candidates = [
        *_parameter_collectives(work),
        *_gradient_sums(work),
        *_folded_bias_sums(work),
        *_tensor_sums(work),
        *_attention_collectives(work),
        *_image_gathers(work),
    ]
    return [collective for collective in candidates if collective.axes and collective.bytes]


def _parameter_collectives(work: Workload) -> Iterator[Collective]:
    """Yields the gathering of parameters that `fsdp` splits, and the scattering of their gradients.

    The parameters of the blocks are gathered block by block in the compute dtype, those outside once a
    micro-batch in float32. With `remat` the backward pass gathers a block again; without, it keeps the gathered block.
    If parameters are gathered once for all micro-batches, their gradients are summed in float32 before they are
    scattered, and norms are gathered like all others.
    """
    axes, once = _used_axes(work, layout.TABLE["width"]), work.gathers_once
    blocks, others = (work.gathered_bytes(_split(sizes)) for sizes in (work.state.blocks, work.state.others))
    if not once:
        blocks -= work.gathered_bytes(work.state.folded)
    small, depth = work.itemsize / FLOAT32, work.shape.depth
    executions, outer_loops = (1, 0) if once else (work.micro_batches, int(work.micro_batches > 1))
    passes = 1 if once or work.settings.model.remat == "none" else 2
    block, loops = round(blocks / depth * small), 0 if once else outer_loops + int(work.settings.model.scan)
    yield Collective("all-gather", axes, block, depth * passes * executions, loops)
    yield Collective("reduce-scatter", axes, round(blocks / depth) if once else block, depth * executions, loops)
    yield Collective("all-gather", axes, round(others), executions, outer_loops)
    yield Collective("reduce-scatter", axes, round(others), executions, outer_loops)


def _gradient_sums(work: Workload) -> Iterator[Collective]:
    """Yields the sums of gradients: once a step in float32, and over `context` in every block.

    Once a step the gradients of parameters that `fsdp` splits are summed over replicas, where every device has its
    shard, and those of the other parameters, which are biases, over all devices that share the batch.
    """
    state, batch = work.state, layout.TABLE["batch"]
    replicas = tuple(axis for axis in batch if axis not in layout.TABLE["width"])
    total = work.device_bytes(state.blocks) + work.device_bytes(state.others)
    split = work.device_bytes(_split(state.blocks)) + work.device_bytes(_split(state.others))
    yield Collective("all-reduce", _used_axes(work, replicas), round(split), 1, 0)
    yield Collective("all-reduce", _used_axes(work, batch), round(total - split), 1, 0)
    block = (work.device_bytes(state.blocks) - work.device_bytes(state.folded)) / work.shape.depth
    executions, small = work.shape.depth * work.micro_batches, work.itemsize / FLOAT32
    yield Collective("all-reduce", _used_axes(work, ("context",)), round(block * small), executions, _block_loops(work))


def _folded_bias_sums(work: Workload) -> Iterator[Collective]:
    """Yields the sums of the biases that norms leave to dense layers, products of vectors and kernels split by `fsdp`.

    They are float32, as are the sums of their gradients. With `remat` the backward pass repeats the former.
    """
    if work.gathers_once or work.settings.model.norm == "rmsnorm":  # which has no bias
        return
    local, passes = work.local, 2 if work.settings.model.remat == "none" else 3
    hidden = local.hidden * (2 if work.shape.activation == "swiglu" else 1)
    size, axes = FLOAT32 * (3 * local.heads * local.head_size + hidden), _used_axes(work, layout.TABLE["width"])
    yield Collective("all-reduce", axes, size, passes * work.shape.depth * work.micro_batches, _block_loops(work))


def _tensor_sums(work: Workload) -> Iterator[Collective]:
    """Yields the sums over `tensor` of activations [B, N, D], of which each device has a partial sum.

    Forward: the outputs of attention and MLP; backward: the gradients of their inputs, to which SwiGLU's gate adds
    another. Parallel attention and MLP have one sum for both outputs (two in a CPU's program). With `remat="block"` the
    backward pass repeats the sum of attention's output, which the second norm needs. The gradients of norms and
    LayerScales are summed too: they follow from those of kernels, of which each device has a part.
    """
    model, shape = work.settings.model, work.shape
    sums = (3 if shape.parallel else 4) + int(shape.activation == "swiglu")
    sums += int(model.remat == "block" and not shape.parallel)
    activations = work.rows * work.local.tokens * shape.width * work.itemsize
    blocks, loops, axes = shape.depth * work.micro_batches, _block_loops(work), _used_axes(work, ("tensor",))
    yield Collective("all-reduce", axes, round(activations), sums * blocks, loops)
    yield Collective("all-reduce", axes, round(work.device_bytes(work.state.folded) / shape.depth), blocks, loops)


def _attention_collectives(work: Workload) -> Iterator[Collective]:
    """Yields what attention over split tokens sends: keys and values around a ring, or an all-to-all with heads."""
    axes, model, local = _used_axes(work, ("context",)), work.settings.model, work.local
    shards = work.sizes.get("context", 1)
    elements = work.rows * local.tokens * local.heads * local.head_size  # queries, keys, values or output of a device
    blocks, loops = work.shape.depth * work.micro_batches, _block_loops(work)
    if model.context_attention == "all_to_all":
        repeated = {"none": 0, "names": 3, "block": 4}[model.remat]  # "names" saves them as before the exchange
        yield Collective("all-to-all", axes, round(elements * work.itemsize), (8 + repeated) * blocks, loops)
        return
    passes = 3 if model.remat == "block" else 2
    sends = passes * (shards - 1) * 2
    yield Collective("collective-permute", axes, round(elements * work.itemsize), sends * blocks, loops + 1)
    yield Collective("collective-permute", axes, round(elements * FLOAT32), 2 * shards * blocks, loops + 1)  # gradients


def _image_gathers(work: Workload) -> Iterator[Collective]:
    """Yields the gathering of all images for mixup and CutMix, if some partners are on two devices.

    The images are bytes, unless the device has warped them. Crop and flip are taken to be the host's.
    """
    settings, axes = work.settings, layout.TABLE["batch"]
    if not settings.mixup and not settings.cutmix:
        return
    if partners_are_local(settings.batch_size, settings.data.repeats, device_count(work.sizes, axes)):
        return
    data, pixels = settings.data, math.prod(pair(settings.model.image_size)) * work.shape.channels
    size = FLOAT32 if any((data.shift, data.rotate, data.scale, data.shear)) else 1
    yield Collective("all-gather", _used_axes(work, axes), settings.batch_size * pixels * size, 1, 0)


def _split(sizes_by_axes: Mapping[Axes, int]) -> dict[Axes, int]:
    """Returns the part of a field of `StateBytes` that `fsdp` splits."""
    return {axes: size for axes, size in sizes_by_axes.items() if "fsdp" in axes}


def _block_loops(work: Workload) -> int:
    """Returns the number of loops around a block: over blocks and over micro-batches."""
    return int(work.settings.model.scan) + int(work.micro_batches > 1)


def _used_axes(work: Workload, axes: Axes) -> Axes:
    return tuple(axis for axis in axes if work.sizes.get(axis, 1) > 1)

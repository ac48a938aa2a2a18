"""What devices tell each other in a training step, by arithmetic: the collectives that the layout asks for.

Compilers find others at times: a TPU's makes some reduce-scatters whole sums, which send twice as much, and sums over
`context` and `fsdp` together. Sums of a few numbers are left out.
"""

import math
from collections.abc import Iterator

from vit_dist.config import pair
from vit_dist.mesh import layout
from vit_dist.plan.collectives import Collective
from vit_dist.plan.estimate.workload import Axes, Workload

FLOAT32 = 4


def step_collectives(load: Workload) -> list[Collective]:
    """The collectives of one step, on a mesh whose axes of one device are left out."""
    said = [*_of_parameters(load), *_of_gradients(load), *_of_heads(load), *_of_tokens(load), *_of_images(load)]
    return [one for one in said if one.axes and one.bytes]


def _of_parameters(load: Workload) -> Iterator[Collective]:
    """Parameters gathered before use and gradients scattered, block by block; what is outside once a micro-batch.

    Blocks' travel in the dtype of the arithmetic. With `remat` the backward pass gathers them again; without, it keeps
    them. For all micro-batches together gradients have been summed in float32.
    """
    axes, once = _there(load, layout.TABLE["width"]), load.gathers_once
    blocks, others = load.gathered(load.held.blocks), load.gathered(load.held.others)
    small, depth = load.itemsize / FLOAT32, load.shape.depth
    times, around = (1, 0) if once else (load.times, int(load.times > 1))
    passes = 1 if once or load.settings.model.remat == "none" else 2
    block, within = round(blocks / depth * small), 0 if once else around + int(load.settings.model.scan)
    yield Collective("all-gather", axes, block, depth * passes * times, within)
    yield Collective("reduce-scatter", axes, round(blocks / depth) if once else block, depth * times, within)
    yield Collective("all-gather", axes, round(others), times, around)
    yield Collective("reduce-scatter", axes, round(others), times, around)


def _of_gradients(load: Workload) -> Iterator[Collective]:
    """The sum over replicas once a step, in float32, as parameters lie; over parts of an image in every block."""
    own = load.own(load.held.blocks) + load.own(load.held.others)
    yield Collective("all-reduce", _there(load, ("dcn_data", "data")), round(own), 1, 0)
    block = load.own(load.held.blocks) / load.shape.depth * load.itemsize / FLOAT32
    loops = int(load.settings.model.scan) + int(load.times > 1)
    yield Collective("all-reduce", _there(load, ("context",)), round(block), load.shape.depth * load.times, loops)


def _of_heads(load: Workload) -> Iterator[Collective]:
    """Sums of what the devices of a tensor group have each of a token [B, N, D].

    Of attention's and of the MLP's output, and, on the way back, of the gradients of their inputs. Side by side, both
    outputs are one sum. `remat="block"` makes again those that a later gradient needs.
    """
    model, shape = load.settings.model, load.shape
    sums = 3 if shape.parallel else 4
    if model.remat == "block":
        scaled = model.layer_scale is not None
        sums += int(not shape.parallel or scaled) + int(scaled)
    tokens = load.rows * load.part.tokens * shape.width * load.itemsize
    loops = int(model.scan) + int(load.times > 1)
    yield Collective("all-reduce", _there(load, ("tensor",)), round(tokens), sums * shape.depth * load.times, loops)


def _of_tokens(load: Workload) -> Iterator[Collective]:
    """Attention over tokens that are split: keys and values go round, or tokens are traded for heads and back."""
    axes, model, part = _there(load, ("context",)), load.settings.model, load.part
    parts = load.sizes.get("context", 1)
    one = load.rows * part.tokens * part.heads * part.head_size  # queries, keys, values or output of a device
    blocks, loops = load.shape.depth * load.times, int(model.scan) + int(load.times > 1)
    if model.context_attention == "all_to_all":
        again = {"none": 0, "names": 3, "block": 4}[model.remat]  # what is kept has its name before it is traded
        yield Collective("all-to-all", axes, round(one * load.itemsize), (8 + again) * blocks, loops)
        return
    passes = 3 if model.remat == "block" else 2
    turns = passes * (parts - 1) * 2
    yield Collective("collective-permute", axes, round(one * load.itemsize), turns * blocks, loops + 1)
    yield Collective("collective-permute", axes, round(one * FLOAT32), 2 * parts * blocks, loops + 1)  # gradients


def _of_images(load: Workload) -> Iterator[Collective]:
    """Images change places with their partners to be mixed, in float32."""
    if load.settings.mixup or load.settings.cutmix:
        pixels = math.prod(pair(load.settings.model.image_size)) * load.shape.channels
        size = load.rows * load.times * pixels * FLOAT32
        yield Collective("collective-permute", _there(load, layout.TABLE["batch"]), round(size), 1, 0)


def _there(load: Workload, axes: Axes) -> Axes:
    return tuple(axis for axis in axes if load.sizes.get(axis, 1) > 1)

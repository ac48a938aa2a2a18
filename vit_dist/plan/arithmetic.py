"""The arithmetic of one device's share of a training step, from the config and the sizes of the mesh's axes."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from vit_dist.config import Config
from vit_dist.mesh import layout
from vit_dist.model import flops, kernels
from vit_dist.plan.targets import Chip

Sizes = Mapping[str, int]  # axis of the mesh -> its size; a missing axis has size 1


def device_flops(settings: Config, attention: str, sizes: Sizes) -> float:
    """Returns the floating-point operations of one device's matrix products in a training step.

    Outside the blocks, all devices of a tensor group compute the same.

    Args:
      settings: the config, with `model.num_classes` filled in.
      attention: the implementation, as `attention_implementation` names it.
      sizes: the mesh.
    """
    outside = flops.training_flops(dataclasses.replace(settings.model, depth=0))
    within = flops.hardware_flops(settings.model, attention) - outside
    examples = settings.batch_size / device_count(sizes, layout.TABLE["batch"])
    return examples * (within / device_count(sizes, ("context", "tensor")) + outside)


def attention_implementation(settings: Config, chip: Chip, sizes: Sizes) -> str:
    """Returns what computes attention on a mesh of these chips, as `kernels.implementation` names it."""
    heads, tokens = (device_count(sizes, layout.TABLE[name]) for name in ("heads", "tokens"))
    return kernels.implementation(settings.model, chip.platform, chip.kind, head_shards=heads, token_shards=tokens)


def device_count(sizes: Sizes, axes: Iterable[str]) -> int:
    """Returns the number of devices that these axes of a mesh span."""
    return math.prod(sizes.get(axis, 1) for axis in axes)

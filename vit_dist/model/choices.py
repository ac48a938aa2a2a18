"""Decides `model.scan` and `model.remat` where a config leaves them to the program, by platform, depth and batch."""

import dataclasses
import logging
from typing import Literal

from vit_dist import config
from vit_dist.model import kernels
from vit_dist.model.saved import LocalShape, saved_arrays, saved_bytes
from vit_dist.model.shape import shape_of

_log = logging.getLogger(__name__)

# The deepest model whose blocks are unrolled, by platform; elsewhere and deeper, they are a loop, which compiles sooner
# but copies what it saves into stacks and out of them. Compiled (`make bench-compiled`, 2026-11-27), a step of B/16
# with 256 images on each of 8 H100 takes 55 ms by `plan` instead of 79, and one of S/16 with 128 on each of 16 v5e
# 35 ms instead of 40, with less memory. The TPU compiler takes minutes for 12 blocks, and gigabytes of the host's
# memory for 24. On a CPU, CIFAR-10's Ti/4 runs a fifth faster (`benchmarks/step.py --model=cifar10`).
UNROLLED_DEPTH = {"gpu": 24, "cuda": 24, "tpu": 12, "cpu": 12}
# The share of a device's memory that the arrays saved by all blocks may take. The rest is for the state, gradients,
# gathered parameters and what one block needs at a time.
SHARE = 0.5
Remat = Literal["none", "names", "block"]
REMATS: tuple[Remat, ...] = ("none", "names", "block")  # the fastest first


def decided(
    model: config.Model, platform: str, kind: str, *, examples: float = 0.0, memory_bytes: int | None = None
) -> config.Model:
    """Returns the model's config without "auto" in `scan` and `remat`, and logs what was chosen.

    Args:
      model: the config.
      platform: of the devices, as in `jax.Device.platform`.
      kind: their `device_kind`.
      examples: those of one device in a micro-batch, as if no axis but the batch's split them.
      memory_bytes: a device's memory; None if it is unknown, and nothing is computed again to save it.
    """
    if model.scan == "auto":
        depth = shape_of(model).depth
        scan = depth > UNROLLED_DEPTH.get(platform, 0)
        model = dataclasses.replace(model, scan=scan)
        _log.info("model.scan=auto: %s, for %d blocks on a %s", "true" if scan else "false", depth, platform)
    if model.remat == "auto":
        fitting = (
            remat
            for remat in REMATS
            if memory_bytes is None or examples * _saved_bytes(model, remat, platform, kind) <= SHARE * memory_bytes
        )
        model = dataclasses.replace(model, remat=next(fitting, REMATS[-1]))
        _log.info("model.remat=auto: %s", model.remat)
    return model


def _saved_bytes(model: config.Model, remat: Remat, platform: str, kind: str) -> int:
    """Returns the bytes that all blocks save of one example."""
    shape = shape_of(model)
    size = shape.width // shape.heads
    local = LocalShape(shape.tokens, shape.width, shape.heads, size, shape.mlp, tiled=platform == "tpu")
    attention = kernels.implementation(model, platform, kind)
    arrays = saved_arrays(dataclasses.replace(model, remat=remat), attention)
    return shape.depth * saved_bytes(arrays, local)

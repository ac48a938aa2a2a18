"""Devices into a mesh: how many take each axis, and in which order.

Every axis is Explicit, so that shardings are part of an array's type. An axis of one is left out, except that a mesh
of one device keeps `data`: a program then never needs to ask whether there is a mesh.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from vit_dist import config
from vit_dist.config import ConfigError

AXES = ("data", "fsdp", "tensor")  # outermost first: neighbours in the device list talk most, so `tensor` is last


def axis_sizes(mesh: config.Mesh, device_count: int) -> dict[str, int]:
    """How many devices each axis of `AXES` takes, -1 filled in. Raises `ConfigError` where they cannot be had."""
    asked = dataclasses.asdict(mesh)
    for axis in set(asked) - set(AXES):
        if asked[axis] != 1:
            raise ConfigError(f"mesh.{axis}: must be 1, found {asked[axis]}; this version does not build that axis yet")
    sizes = {axis: asked[axis] for axis in AXES}
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise ConfigError(f"mesh.{axis}: must be above 0, or -1 for all that are left, found {size}")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh.{free[1]}: only one axis may be -1, and mesh.{free[0]} is")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1)) or "data=1"
    if fixed > device_count:
        raise ConfigError(
            f"mesh: {shape} needs {fixed} devices, found {device_count}; "
            f"make an axis smaller or pretend to have more with fake_devices={fixed}"
        )
    if free and device_count % fixed:
        below, above = _nearest_divisors(device_count, fixed)
        raise ConfigError(
            f"mesh: {shape} does not divide the {device_count} devices here, of which mesh.{free[0]} is to take the "
            f"rest; take {below} or {above}"
        )
    if free:
        sizes[free[0]] = device_count // fixed
    return sizes


def _nearest_divisors(of: int, near: int) -> tuple[int, int]:
    """The divisors of `of` next below and above `near`, which is none itself."""
    divisors = [size for size in range(1, of + 1) if of % size == 0]
    return max(size for size in divisors if size < near), min(size for size in divisors if size > near)


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of these axis sizes over the first devices of the list, row-major."""
    kept = {axis: size for axis, size in sizes.items() if size > 1} or {"data": 1}
    count = math.prod(kept.values())
    grid = np.asarray(devices[:count], dtype=object).reshape(tuple(kept.values()))
    return Mesh(grid, tuple(kept), axis_types=(AxisType.Explicit,) * len(kept))

"""Arranges devices as a mesh: how many each axis takes, and in which order.

Devices are connected by two kinds of links: fast ones within a TPU slice or a node, and the data-centre network (DCN)
between slices or nodes. The axis `dcn_data` crosses the network, and every other axis then stays within one slice: 2
nodes of 8 GPUs under `dcn_data=2, fsdp=4, tensor=2` sum gradients over the network, and exchange parameters and
activations over NVLink only. Without `dcn_data` the axes run over all devices in order, outer axes across nodes first.

Every axis is Explicit, so that shardings are part of an array's type. Axes of size 1 are left out, except that a mesh
of one device keeps `data`: a program then never needs to check whether there is a mesh.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from vit_dist import config
from vit_dist.config import ConfigError

# Outermost first. Neighbours in the order of devices have the fastest links, so the axes that communicate most come
# last: `tensor` in every product, `context` in every attention, `fsdp` in every block, the others once a step.
AXES = ("dcn_data", "data", "fsdp", "context", "tensor")


def axis_sizes(mesh: config.Mesh, device_count: int) -> dict[str, int]:
    """Returns the size of each axis of `AXES`, with -1 filled in.

    Raises `ConfigError` if a size is out of range, or if the devices are too few or do not divide.
    """
    sizes = {axis: dataclasses.asdict(mesh)[axis] for axis in AXES}
    if sizes["dcn_data"] < 1:
        raise ConfigError(f"mesh.dcn_data: must be above 0, the number of slices or nodes, found {sizes['dcn_data']}")
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise ConfigError(f"mesh.{axis}: must be above 0, or -1 for all that are left, found {size}")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh.{free[1]}: only one axis may be -1, and mesh.{free[0]} is; set one to a number")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = _as_text(sizes)
    if fixed > device_count:
        raise ConfigError(
            f"mesh: {shape} needs {fixed} devices, found {device_count}; "
            f"make an axis smaller, or test on the CPU with fake_devices={fixed}"
        )
    if free and device_count % fixed:
        below, above = _nearest_divisors(device_count, fixed)
        raise ConfigError(
            f"mesh: {shape} uses {fixed} devices, which do not divide the {device_count} there are, so "
            f"mesh.{free[0]}=-1 cannot take the rest; make the product of the others {below} or {above}"
        )
    if free:
        sizes[free[0]] = device_count // fixed
    return sizes


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """Makes the mesh of these sizes.

    Args:
      sizes: sizes of axes of `AXES`; axes that are not given have size 1.
      devices: the devices to choose from; a smaller mesh takes the first ones.

    Returns:
      The mesh, all its axes Explicit.

    Raises:
      ConfigError: the devices are not as many slices or nodes as `dcn_data` asks for, or a TPU's torus has no room for
        these axes.
    """
    sizes = dict.fromkeys(AXES, 1) | sizes
    slices = sizes["dcn_data"]
    inner = tuple(sizes[axis] for axis in AXES if axis != "dcn_data")
    grid = np.stack([_arrange(inner, group) for group in _devices_by_slice(sizes, devices)]).reshape(slices, *inner)
    kept = [axis for axis in AXES if sizes[axis] > 1] or ["data"]
    grid = grid.reshape([sizes[axis] for axis in kept])
    return Mesh(grid, tuple(kept), axis_types=(AxisType.Explicit,) * len(kept))


def _devices_by_slice(sizes: dict[str, int], devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Returns the devices that the mesh takes from each of the `dcn_data` slices or nodes."""
    count, size = sizes["dcn_data"], math.prod(sizes.values()) // sizes["dcn_data"]
    kind, groups = _slices_or_processes(devices)
    if count == 1:
        if kind == "slices" and size > len(groups[0]) and devices[0].platform == "tpu":
            raise ConfigError(
                f"mesh.dcn_data: {_as_text(sizes)} spans {len(groups)} TPU slices of {len(groups[0])} chips; set it to "
                f"{len(groups)} and let the other axes fill one slice"
            )
        return [list(devices[:size])]
    if kind == "single" and devices[0].platform == "cpu":  # fake devices of one process pretend to be slices too
        groups = [list(devices[first : first + size]) for first in range(0, count * size, size)]
    group_sizes = sorted({len(group) for group in groups})
    if len(groups) % count or len(group_sizes) > 1 or group_sizes[0] * (len(groups) // count) < size:
        available = "a single slice or node" if kind == "single" else f"{len(groups)} {kind}"
        raise ConfigError(
            f"mesh.dcn_data: {_as_text(sizes)} asks for {count} slices or nodes of {size} devices each, found "
            f"{available} of {' or '.join(map(str, group_sizes))} devices; set it to a divisor of their number"
        )
    together = len(groups) // count  # how many neighbouring nodes count as one
    joined = [sum(groups[i * together : (i + 1) * together], []) for i in range(count)]
    return [group[:size] for group in joined]


def _slices_or_processes(devices: Sequence[jax.Device]) -> tuple[str, list[list[jax.Device]]]:
    """Returns which units the network connects, "slices", "processes" or "single", and the devices of each unit."""
    for kind, attribute in (("slices", "slice_index"), ("processes", "process_index")):
        groups: dict[int, list[jax.Device]] = {}
        for device in devices:
            groups.setdefault(getattr(device, attribute, 0) or 0, []).append(device)
        if len(groups) > 1:
            return kind, [groups[index] for index in sorted(groups)]
    return "single", [list(devices)]


def _arrange(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """Returns the devices of one slice as an array of `shape`, with the fastest links along the last axes."""
    if devices[0].platform == "tpu":  # a torus of chips: neighbours in the list need not be neighbours on the torus
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        except (AssertionError, NotImplementedError) as error:
            axes = _as_text(dict(zip((axis for axis in AXES if axis != "dcn_data"), shape)))
            raise ConfigError(
                f"mesh: {axes} cannot be laid over the {len(devices)} TPU chips that it takes; take all chips of the "
                "slice, and axes that divide its sides"
            ) from error
    return np.asarray(devices, dtype=object).reshape(shape)


def _nearest_divisors(value: int, near: int) -> tuple[int, int]:
    """Returns the divisors of `value` next below and next above `near`, which is no divisor itself."""
    divisors = [size for size in range(1, value + 1) if value % size == 0]
    return max(size for size in divisors if size < near), min(size for size in divisors if size > near)


def _as_text(sizes: dict[str, int]) -> str:
    """Returns the axes as in `data=4 x tensor=2`, without those of size 1 or -1."""
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1)) or "data=1"

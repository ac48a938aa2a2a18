"""Devices into a mesh: how many take each axis, and in which order.

Two kinds of wires join devices: quick ones within a TPU slice or a node, and the data-centre network (DCN) between
slices or nodes. `dcn_data` is the axis that crosses the network, and every other axis then stays within one slice: 2
nodes of 8 GPUs under `dcn_data=2, fsdp=4, tensor=2` exchange gradients over the network, and parameters and
activations over NVLink alone. Without it the axes run over all devices in order, the outer ones across nodes first.

Every axis is Explicit, so that shardings are part of an array's type. An axis of one is left out, except that a mesh
of one device keeps `data`: a program then never needs to ask whether there is a mesh.
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

# Outermost first. Neighbours in the order of devices have the quickest wires between them, so the axes that talk most
# come last: `tensor` in every product, `context` in every attention, `fsdp` in every block, the rest once a step.
AXES = ("dcn_data", "data", "fsdp", "context", "tensor")


def axis_sizes(mesh: config.Mesh, device_count: int) -> dict[str, int]:
    """How many devices each axis of `AXES` takes, -1 filled in. Raises `ConfigError` where they cannot be had."""
    sizes = {axis: dataclasses.asdict(mesh)[axis] for axis in AXES}
    if sizes["dcn_data"] < 1:
        raise ConfigError(f"mesh.dcn_data: must be above 0, the number of slices or nodes, found {sizes['dcn_data']}")
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise ConfigError(f"mesh.{axis}: must be above 0, or -1 for all that are left, found {size}")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"mesh.{free[1]}: only one axis may be -1, and mesh.{free[0]} is")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    shape = _say(sizes)
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


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of these sizes of `AXES` (1 where not given); where it needs fewer devices it takes the first.

    Raises `ConfigError` where the devices are not the slices or nodes that `dcn_data` counts.
    """
    sizes = dict.fromkeys(AXES, 1) | sizes
    slices = sizes["dcn_data"]
    inner = tuple(sizes[axis] for axis in AXES if axis != "dcn_data")
    grid = np.stack([_lay_out(inner, group) for group in _groups(sizes, devices)]).reshape(slices, *inner)
    kept = [axis for axis in AXES if sizes[axis] > 1] or ["data"]
    grid = grid.reshape([sizes[axis] for axis in kept])
    return Mesh(grid, tuple(kept), axis_types=(AxisType.Explicit,) * len(kept))


def _groups(sizes: dict[str, int], devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """The devices of each of the `dcn_data` slices or nodes, no more than the mesh takes."""
    count, each = sizes["dcn_data"], math.prod(sizes.values()) // sizes["dcn_data"]
    kind, found = _by_network(devices)
    if count == 1:
        if kind == "slices" and each > len(found[0]) and devices[0].platform == "tpu":
            raise ConfigError(
                f"mesh.dcn_data: {_say(sizes)} spans {len(found)} TPU slices of {len(found[0])} chips; set it to "
                f"{len(found)} and let the other axes fill one slice"
            )
        return [list(devices[:each])]
    if kind == "one" and devices[0].platform == "cpu":  # fake devices of one process pretend to be slices too
        found = [list(devices[first : first + each]) for first in range(0, count * each, each)]
    sizes_found = sorted({len(group) for group in found})
    if len(found) % count or len(sizes_found) > 1 or sizes_found[0] * (len(found) // count) < each:
        what = "a single slice or node" if kind == "one" else f"{len(found)} {kind}"
        raise ConfigError(
            f"mesh.dcn_data: {_say(sizes)} asks for {count} slices or nodes of {each} devices each, found {what} of "
            f"{' or '.join(map(str, sizes_found))} devices; set it to a divisor of their number"
        )
    together = len(found) // count  # nodes that count as one, side by side
    joined = [sum(found[i * together : (i + 1) * together], []) for i in range(count)]
    return [group[:each] for group in joined]


def _by_network(devices: Sequence[jax.Device]) -> tuple[str, list[list[jax.Device]]]:
    """What the network joins, "slices", "processes" or "one", and the devices of each, in their order."""
    for kind, attribute in (("slices", "slice_index"), ("processes", "process_index")):
        groups: dict[int, list[jax.Device]] = {}
        for device in devices:
            groups.setdefault(getattr(device, attribute, 0) or 0, []).append(device)
        if len(groups) > 1:
            return kind, [groups[key] for key in sorted(groups)]
    return "one", [list(devices)]


def _lay_out(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of one slice as an array of `shape`, neighbours by the quickest wires along the last axes."""
    if devices[0].platform == "tpu":  # a torus of chips, whose neighbours are not neighbours in the list
        try:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        except (AssertionError, NotImplementedError) as error:
            asked = _say(dict(zip((axis for axis in AXES if axis != "dcn_data"), shape)))
            raise ConfigError(
                f"mesh: {asked} cannot be laid over the {len(devices)} TPU chips that it takes; take all chips of the "
                "slice, and axes that divide its sides"
            ) from error
    return np.asarray(devices, dtype=object).reshape(shape)


def _nearest_divisors(of: int, near: int) -> tuple[int, int]:
    """The divisors of `of` next below and above `near`, which is none itself."""
    divisors = [size for size in range(1, of + 1) if of % size == 0]
    return max(size for size in divisors if size < near), min(size for size in divisors if size > near)


def _say(sizes: dict[str, int]) -> str:
    """`data=4 x tensor=2`."""
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size not in (1, -1)) or "data=1"

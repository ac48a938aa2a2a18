"""The links between the devices of a group, and the bytes/s that one device sends over them.

TPU: a slice is a grid of chips with a wire between neighbours, which takes one port of each. If the last chip of a
dimension is wired to the first, a ring along it sends in both directions, through two ports of a chip. Otherwise the
chips form a line, where a collective takes as long as on a ring in one direction: one port. A group that spans several
dimensions uses all of them at once. Groups whose members are `step` chips apart share the wires with the `step - 1`
groups in between, and each has its share of their rate. A side of v5e and v6e is a ring if it has 16 chips. The sides
of v4 and v5p are rings if all three are multiples of 4, because these slices are cubes of 4x4x4 chips joined by optical
switches (Austin et al. 2025, "How to Scale Your Model", "TPUs"; Google Cloud documentation, "TPU v4", on tori and
meshes).

GPU: the GPUs of a node are connected by NVLink switches, each at its full rate with any other.

Nodes and slices are connected by the network. Each device has a fixed share of its rate. A group with several devices
in a node or slice splits its data among them and so uses all their shares at once, unless the links inside the node or
slice are slower.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from vit_dist.plan.targets import Chip

NETWORK = "network"
_RING_SIDE = 16  # chips along a side of a two-dimensional torus that is closed to a ring
_CUBE_SIDE = 4  # chips along a side of the cubes of a three-dimensional torus


class Link(NamedTuple):
    """What connects the devices of a group."""

    name: str  # "ICI", "NVLink", "network", or "" for none
    bandwidth: float | None  # bytes/s that one device sends; None if it is unknown


def group(mesh: Mesh, axes: Iterable[str]) -> list[jax.Device]:
    """Returns the mesh's first device and the devices that it communicates with over these axes."""
    over = set(axes)
    index = tuple(slice(None) if axis in over else slice(1) for axis in mesh.axis_names)
    return list(mesh.devices[index].ravel())


def crosses(devices: Sequence[jax.Device]) -> str | None:
    """Returns the boundary between these devices: "slices", "nodes", or None if they share one or are CPU devices."""
    boundary = {"tpu": "slices", "gpu": "nodes"}.get(devices[0].platform)
    return boundary if len(set(map(_slice_or_node, devices))) > 1 else None


def slowest_link(chip: Chip, devices: Sequence[jax.Device]) -> Link:
    """Returns the slowest link that a collective of these devices uses; no link for a single device and for CPUs."""
    if len(devices) < 2 or chip.link_bandwidth is None or chip.network_bandwidth is None:
        return Link("", None)
    members = Counter(map(_slice_or_node, devices))
    neighbours = [device for device in devices if _slice_or_node(device) == _slice_or_node(devices[0])]
    bandwidths = {}
    if len(neighbours) > 1:
        is_gpu = chip.platform == "gpu"
        bandwidths[chip.link] = chip.link_bandwidth if is_gpu else _torus_bandwidth(chip, neighbours)
    if len(members) > 1:
        bandwidths[NETWORK] = chip.network_bandwidth * min(members.values())
    slowest = min(bandwidths, key=lambda name: bandwidths[name])
    return Link(slowest, bandwidths[slowest])


def _slice_or_node(device: Any) -> int:
    """Returns the index of the device's slice or node."""
    if device.platform == "gpu" and device.client.runtime_type == "compile_only_runtime":
        return device.process_index  # with devices for compiling alone, a node is a process and `slice_index` is 0
    return getattr(device, "slice_index", 0) or 0  # None on a TPU with one slice


def _torus_bandwidth(chip: Chip, devices: Sequence[Any]) -> float:
    """Returns the bytes/s that one chip sends over all dimensions of the slice that these chips span."""
    assert chip.link_bandwidth is not None
    sides = _sides(devices[0].client)
    ports = 0.0
    for side, positions in zip(sides, zip(*(device.coords for device in devices))):
        coords = sorted(set(positions))
        if len(coords) > 1:
            step = (coords[-1] - coords[0]) / (len(coords) - 1)
            is_ring = _is_ring(chip, sides, side) and len(coords) * step == side
            ports += (2 if is_ring else 1) / step
    return ports * chip.link_bandwidth


def _is_ring(chip: Chip, sides: Sequence[int], side: int) -> bool:
    """Whether the chips along this side of the slice are wired as a ring."""
    return side == _RING_SIDE if chip.ports == 4 else all(length % _CUBE_SIDE == 0 for length in sides)


@functools.cache
def _sides(client: Any) -> tuple[int, ...]:
    """Returns the number of chips along each side of the slice, from all devices of the compiler's client."""
    return tuple(max(positions) + 1 for positions in zip(*(device.coords for device in client.devices())))

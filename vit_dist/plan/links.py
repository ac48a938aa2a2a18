"""Which wire the devices of a group talk over, and how many bytes a second leave one of them.

A TPU slice is a grid of chips with a wire between neighbours, one port at each end. Where the last chip of a dimension
is wired to its first, a ring along it uses both directions, and so two ports of a chip; on a line, what all have to
learn passes each wire once in each direction, which takes as long as a ring in one direction: one port. A group that
spans several dimensions uses all of them at once. Members that are `step` chips apart share the wires with the groups
in between, and have that part of them. A side of v5e and v6e is closed to a ring where it has 16 chips, and those of
v4 and v5p where all three are multiples of 4, for these slices are made of cubes of 4x4x4 joined by optical switches
(Austin et al. 2025, "How to Scale Your Model", "TPUs"; Google Cloud documentation, "TPU v4", on tori and meshes).

GPUs of a node talk through NVLink switches, each at its full rate with any other. What goes between nodes or slices
goes over the network, to which each device brings its own share: a group that has several members in a node or slice
sends by all their shares at once, each its own part of the data, unless the wires within are slower still.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from vit_dist.plan.targets import Chip

NETWORK = "network"
_CLOSED_SIDE = 16  # chips, of a torus of two dimensions
_CUBE_SIDE = 4  # chips, of a torus of three


def group(mesh: Mesh, axes: Iterable[str]) -> list[jax.Device]:
    """The devices that the first of the mesh transfers with over these axes, itself the first among them."""
    over = set(axes)
    places = tuple(slice(None) if axis in over else slice(1) for axis in mesh.axis_names)
    return list(mesh.devices[places].ravel())


def crosses(devices: Sequence[jax.Device]) -> str | None:
    """What lies between the devices: "slices", "nodes", or None within one of them (and between pretended devices)."""
    kind = {"tpu": "slices", "gpu": "nodes"}.get(devices[0].platform)
    return kind if len(set(map(_place, devices))) > 1 else None


def link(chip: Chip, devices: Sequence[jax.Device]) -> tuple[str, float | None]:
    """The slowest wire that these devices talk over, and the bytes a second that leave one of them over it.

    "ICI", "NVLink" or "network". ("", None) for a single device, which transfers with nobody, and for a CPU's.
    """
    if len(devices) < 2 or chip.link_bandwidth is None or chip.network_bandwidth is None:
        return "", None
    places = Counter(map(_place, devices))
    here = [device for device in devices if _place(device) == _place(devices[0])]
    wires = []
    if len(here) > 1:
        wires.append((chip.link, chip.link_bandwidth if chip.platform == "gpu" else _torus_bandwidth(chip, here)))
    if len(places) > 1:
        wires.append((NETWORK, chip.network_bandwidth * min(places.values())))
    return min(wires, key=lambda wire: wire[1])


def _place(device: Any) -> int:
    """The slice or node of a device."""
    if device.platform == "gpu" and device.client.runtime_type == "compile_only_runtime":
        return device.process_index  # where nothing runs each node has one process, and `slice_index` is always 0
    return getattr(device, "slice_index", 0) or 0  # a TPU's is None where there is one slice


def _torus_bandwidth(chip: Chip, devices: Sequence[Any]) -> float:
    """Bytes a second that leave one chip over all dimensions of the slice that these chips span."""
    assert chip.link_bandwidth is not None
    sides = _sides(devices[0].client)
    ports = 0.0
    for side, positions in zip(sides, zip(*(device.coords for device in devices))):
        found = sorted(set(positions))
        if len(found) > 1:
            step = (found[-1] - found[0]) / (len(found) - 1)
            closed = _is_ring(chip, sides, side) and len(found) * step == side
            ports += (2 if closed else 1) / step
    return ports * chip.link_bandwidth


def _is_ring(chip: Chip, sides: Sequence[int], side: int) -> bool:
    """Whether the chips along this side of the slice are wired to a ring."""
    return side == _CLOSED_SIDE if chip.ports == 4 else all(one % _CUBE_SIDE == 0 for one in sides)


@functools.cache
def _sides(client: Any) -> tuple[int, ...]:
    """Chips along each side of the slice, by all devices of the compiler's client."""
    return tuple(max(positions) + 1 for positions in zip(*(device.coords for device in client.devices())))

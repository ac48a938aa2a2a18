"""The links of groups of fake devices, which only have coordinates; every rate by hand."""

import dataclasses
import itertools
import types

import jax
import numpy as np
import pytest

from vit_dist.mesh.topology import make_mesh
from vit_dist.plan import links, targets

SMALLEST = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "a100:8", "h200:8", "cpu:8")
CHIPS = {text.split(":")[0]: targets.parse(text).chip for text in SMALLEST}


@dataclasses.dataclass(frozen=True)
class Device:
    platform: str
    client: object = dataclasses.field(repr=False)
    coords: tuple[int, ...] = (0, 0, 0)
    process_index: int = 0
    slice_index: int | None = None


class Client:
    def __init__(self, runtime_type="compile_only_runtime"):
        self.runtime_type, self.every = runtime_type, []

    def devices(self):
        return self.every


def tpu_slices(*sides, slices=1):
    """coords -> device, for each slice of a TPU."""
    client = Client()
    coords = list(itertools.product(*map(range, (sides + (1,))[:3])))
    devices = [
        {at: Device("tpu", client, at, slice_index=index if slices > 1 else None) for at in coords}
        for index in range(slices)
    ]
    client.every = [device for slice_ in devices for device in slice_.values()]
    return devices


def nodes(count, each, runtime="compile_only_runtime"):
    """The GPUs of each node."""
    client = Client(runtime)
    real = runtime != "compile_only_runtime"  # then the process of each GPU is its own, and the slice is the node
    return [
        [
            Device("gpu", client, process_index=node * each + i if real else node, slice_index=node if real else 0)
            for i in range(each)
        ]
        for node in range(count)
    ]


def line(slice_, *coords):
    return [slice_[at] for at in coords]


def test_a_group_is_what_the_first_device_sees_along_the_axes():
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())

    def ids(*axes):
        return [device.id for device in links.group(mesh, axes)]

    assert ids("data") == [0, 4] and ids("fsdp") == [0, 2] and ids("tensor") == [0, 1]
    assert ids("data", "tensor") == [0, 1, 4, 5] == ids("tensor", "data")
    assert ids("data", "fsdp", "tensor") == list(range(8)) and ids() == [0]


def test_a_single_device_has_no_link():
    [slice_] = tpu_slices(2, 2)
    assert links.slowest_link(CHIPS["v5e"], line(slice_, (0, 0, 0))) == ("", None)
    assert links.crosses(line(slice_, (0, 0, 0))) is None


def test_a_cpu_has_no_link():
    devices = jax.devices()
    assert links.slowest_link(CHIPS["cpu"], devices) == ("", None) and links.crosses(devices) is None


@pytest.mark.parametrize(
    ("chip", "sides", "group", "rate"),
    [
        # v5e, 50 GB/s a port. A side below 16 is a line: one port.
        ("v5e", (2, 2), [(0, 0), (0, 1)], 50),
        ("v5e", (4, 4), [(x, 0) for x in range(4)], 50),
        ("v5e", (8, 16), [(x, 0) for x in range(8)], 50),
        # A side of 16 is a ring: two ports; half of it is a line.
        ("v5e", (8, 16), [(0, y) for y in range(16)], 100),
        ("v5e", (8, 16), [(0, y) for y in range(8)], 50),
        # Two dimensions at once: all their ports.
        ("v5e", (4, 4), list(itertools.product(range(4), range(4))), 100),
        ("v5e", (8, 16), list(itertools.product(range(8), range(16))), 150),
        ("v5e", (16, 16), list(itertools.product(range(16), range(16))), 200),
        ("v6e", (16, 16), list(itertools.product(range(16), range(16))), 400),
        # Every fourth chip of a ring of 16: four groups share its two ports. Every second of a line: two share one.
        ("v5e", (16, 16), [(x, 0) for x in range(0, 16, 4)], 25),
        ("v5e", (4, 4), [(0, 0), (2, 0)], 25),
        # Two chips of a ring of 16 that are 8 apart, by either way: 8 groups share its two ports.
        ("v5e", (16, 16), [(0, 0), (8, 0)], 12.5),
        # v5p, 100 GB/s a port: rings where all sides are multiples of 4, and only then.
        ("v5p", (4, 4, 4), [(0, 0, z) for z in range(4)], 200),
        ("v5p", (4, 4, 8), [(0, 0, z) for z in range(8)], 200),
        ("v5p", (4, 4, 8), [(0, 0, z) for z in range(4)], 100),
        ("v5p", (2, 4, 4), [(0, 0, z) for z in range(4)], 100),
        ("v5p", (2, 2, 1), [(0, 0, 0), (1, 0, 0)], 100),
        ("v5p", (4, 4, 4), list(itertools.product(range(4), range(4), range(4))), 600),
        ("v4", (4, 4, 4), list(itertools.product(range(4), range(4), range(4))), 270),
    ],
)
def test_the_rate_in_a_slice_is_that_of_the_ports_along_the_sides_spanned(chip, sides, group, rate):
    [slice_] = tpu_slices(*sides)
    devices = [slice_[(at + (0,))[:3]] for at in group]
    name, found = links.slowest_link(CHIPS[chip], devices)
    assert (name, found) == ("ICI", pytest.approx(rate * 1e9)) and links.crosses(devices) is None


@pytest.mark.parametrize(("members", "rate"), [(1, 3.125), (4, 12.5), (8, 25)])  # a v5e brings 25 Gbit/s
def test_between_slices_each_member_of_a_slice_brings_its_share_of_the_network(members, rate):
    coords = list(itertools.product(range(2), range(4), (0,)))[:members]
    devices = [device for slice_ in tpu_slices(4, 4, slices=2) for device in line(slice_, *coords)]
    assert links.slowest_link(CHIPS["v5e"], devices) == ("network", pytest.approx(rate * 1e9))
    assert links.crosses(devices) == "slices"


def test_if_the_network_of_a_full_pod_is_faster_than_its_ici_the_ici_binds():
    devices = [device for slice_ in tpu_slices(16, 16, slices=2) for device in slice_.values()]
    assert links.slowest_link(CHIPS["v5e"], devices) == ("ICI", 4 * 50e9)  # and not 256 x 3.125
    assert links.crosses(devices) == "slices"


def test_gpus_of_a_node_use_nvlink():
    [node] = nodes(1, 8)
    assert links.slowest_link(CHIPS["h200"], node) == links.slowest_link(CHIPS["h200"], node[:2]) == ("NVLink", 450e9)
    assert links.crosses(node) is None


@pytest.mark.parametrize(
    ("chip", "members", "rate"),
    [("h200", 1, 50), ("h200", 2, 100), ("h200", 8, 400), ("a100", 8, 200)],
)
@pytest.mark.parametrize("runtime", ["compile_only_runtime", "pjrt_ifrt"])
def test_between_nodes_each_gpu_has_a_network_card(chip, members, rate, runtime):
    devices = [device for node in nodes(4, 8, runtime) for device in node[:members]]
    assert links.slowest_link(CHIPS[chip], devices) == ("network", rate * 1e9)
    assert links.crosses(devices) == "nodes"


def test_gpus_of_one_node_that_each_have_a_process_are_no_nodes():
    [node] = nodes(1, 8, "pjrt_ifrt")
    assert links.crosses(node) is None and links.slowest_link(CHIPS["h200"], node)[0] == "NVLink"


def test_more_cards_than_nvlink_can_feed_are_of_no_use():
    chip = dataclasses.replace(CHIPS["h200"], network_bandwidth=100e9)
    devices = [device for node in nodes(2, 8) for device in node]
    assert links.slowest_link(chip, devices) == ("NVLink", 450e9)


def test_a_mesh_whose_groups_are_laid_along_a_torus_is_read_through_its_axes():
    [slice_] = tpu_slices(4, 16)
    grid = np.array(list(slice_.values()), dtype=object).reshape(4, 16)
    mesh = types.SimpleNamespace(devices=grid, axis_names=("data", "fsdp"))
    assert links.slowest_link(CHIPS["v5e"], links.group(mesh, ("fsdp",))) == ("ICI", 100e9)
    assert links.slowest_link(CHIPS["v5e"], links.group(mesh, ("data",))) == ("ICI", 50e9)

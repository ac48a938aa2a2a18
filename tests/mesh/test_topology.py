"""Axis sizes from the config and the number of devices, and the mesh made of them."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.mesh import topology


@pytest.mark.parametrize(
    ("configured", "devices", "sizes"),
    [
        ({}, 8, (1, 8, 1, 1, 1)),
        ({}, 1, (1, 1, 1, 1, 1)),
        ({"data": 2, "fsdp": -1}, 8, (1, 2, 4, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, (1, 2, 2, 1, 2)),
        ({"data": 1, "tensor": -1}, 6, (1, 1, 1, 1, 6)),
        ({"data": 1, "fsdp": 2}, 8, (1, 1, 2, 1, 1)),
        ({"data": -1, "fsdp": 8}, 8, (1, 1, 8, 1, 1)),
        ({"data": 1, "context": -1}, 8, (1, 1, 1, 8, 1)),
        ({"dcn_data": 2}, 8, (2, 4, 1, 1, 1)),
        ({"dcn_data": 2, "data": 1, "fsdp": -1, "tensor": 2}, 8, (2, 1, 2, 1, 2)),
    ],
)
def test_axis_sizes_fill_in_the_rest(configured, devices, sizes):
    assert tuple(topology.axis_sizes(config.Mesh(**configured), devices).values()) == sizes


@pytest.mark.parametrize(
    ("configured", "message"),
    [
        ({"data": 16}, "mesh: data=16 needs 16 devices, found 8; make an axis smaller, .* fake_devices=16"),
        ({"fsdp": 16}, "mesh: fsdp=16 needs 16 devices, found 8"),
        ({"data": 4, "fsdp": 3}, "mesh: data=4 x fsdp=3 needs 12 devices, found 8"),
        ({"fsdp": 3}, "mesh: fsdp=3 uses 3 devices, which do not divide the 8 there are, so mesh.data=-1 .* 2 or 4"),
        ({"fsdp": 3, "tensor": 2}, "mesh: fsdp=3 x tensor=2 uses 6 devices, which do not divide .* 4 or 8"),
        ({"fsdp": -1}, "mesh.fsdp: only one axis may be -1, and mesh.data is"),
        ({"tensor": 0}, "mesh.tensor: must be above 0, or -1 .*, found 0"),
        ({"data": -2}, "mesh.data: must be above 0, or -1 .*, found -2"),
        ({"context": -1}, "mesh.context: only one axis may be -1, and mesh.data is"),
        ({"dcn_data": -1}, "mesh.dcn_data: must be above 0, the number of slices or nodes, found -1"),
        (
            {"dcn_data": 3},
            "mesh: dcn_data=3 uses 3 devices, which do not divide the 8 there are, .* 2 or 4",
        ),
    ],
)
def test_impossible_axis_sizes_are_refused_with_the_numbers(configured, message):
    with pytest.raises(ConfigError, match=message):
        topology.axis_sizes(config.Mesh(**configured), 8)


@dataclasses.dataclass(frozen=True)
class Device:
    """A stand-in for `jax.Device`."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"


def nodes(count, each=4, platform="gpu", slices=False):
    return [Device(i, i // each, i // each if slices else 0, platform) for i in range(count * each)]


def ids(mesh):
    return np.vectorize(lambda device: device.id)(mesh.devices).tolist()


@pytest.mark.parametrize("slices", [False, True])
def test_every_axis_but_dcn_data_stays_within_a_node_or_slice(slices):
    mesh = topology.make_mesh({"dcn_data": 2, "fsdp": 2, "tensor": 2}, nodes(2, slices=slices))
    assert dict(mesh.shape) == {"dcn_data": 2, "fsdp": 2, "tensor": 2}
    assert ids(mesh) == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_slices_are_recognised_in_any_order_of_the_devices():
    shuffled = [nodes(2, slices=True)[i] for i in (5, 0, 4, 1, 2, 7, 3, 6)]
    assert ids(topology.make_mesh({"dcn_data": 2, "data": 4}, shuffled)) == [[0, 1, 2, 3], [5, 4, 7, 6]]


def test_several_nodes_may_count_as_one():
    mesh = topology.make_mesh({"dcn_data": 2, "data": 2, "tensor": 4}, nodes(4))
    assert ids(mesh)[1] == [[8, 9, 10, 11], [12, 13, 14, 15]]


def test_a_mesh_smaller_than_the_slices_takes_part_of_each():
    assert ids(topology.make_mesh({"dcn_data": 2, "data": 2}, nodes(2))) == [[0, 1], [4, 5]]


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ({"dcn_data": 3, "data": 2}, nodes(2), "dcn_data=3 x data=2 asks for 3 slices .* found 2 processes of 4 dev"),
        ({"dcn_data": 2, "data": 4}, nodes(1, 8), "2 slices or nodes of 4 devices each, found a single"),
        ({"dcn_data": 2, "data": 4}, nodes(2, 3), "slices or nodes of 4 devices each, found 2 processes of 3 dev"),
        ({"dcn_data": 2, "data": 3}, nodes(2)[:7], "found 2 processes of 3 or 4 devices; set it to a divisor"),
        ({"fsdp": 8}, nodes(2, platform="tpu", slices=True), "fsdp=8 spans 2 TPU slices of 4 chips; set it to 2 and"),
    ],
)  # fmt: skip
def test_a_wrong_number_of_slices_is_refused_with_the_right_one(sizes, devices, message):
    with pytest.raises(ConfigError, match=f"mesh.dcn_data: .*{message}"):
        topology.make_mesh(sizes, devices)


@dataclasses.dataclass(frozen=True)
class Chip(Device):
    """A chip of a TPU v5e slice of 2 x 4 chips, listed host by host as in jax: 2 x 2 chips each."""

    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0

    @property
    def coords(self):
        host, chip = divmod(self.id, 4)
        return chip % 2, 2 * host + chip // 2, 0


CHIPS = [Chip(i, i // 4) for i in range(8)]


def test_the_chips_of_an_axis_are_neighbours_on_the_torus():
    mesh = topology.make_mesh({"data": 2, "tensor": 4}, CHIPS)
    assert {chip.id for chip in mesh.devices.flat} == set(range(8))
    for group in mesh.devices:
        coords = np.array([chip.coords for chip in group])
        apart = np.abs(coords[:, None] - coords).sum(axis=-1)  # steps along the links, without wraparound
        assert (np.sort(apart, axis=1)[:, 1] == 1).all()  # each has a neighbour in the group
        assert apart.max() <= 3


def test_axes_that_no_torus_has_are_refused():
    with pytest.raises(ConfigError, match="mesh: data=3 cannot be laid over the 3 TPU chips that it takes"):
        topology.make_mesh({"data": 3}, CHIPS)


def test_fake_devices_of_one_process_pretend_to_be_slices_too():
    mesh = topology.make_mesh({"dcn_data": 2, "context": 2, "tensor": 2}, jax.devices())
    numbers = np.vectorize(jax.devices().index)(mesh.devices)
    assert mesh.axis_names == ("dcn_data", "context", "tensor")
    assert numbers.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


def test_axes_of_one_are_left_out_and_all_are_explicit():
    mesh = topology.make_mesh({"data": 2, "fsdp": 1, "tensor": 4}, jax.devices())
    assert dict(mesh.shape) == {"data": 2, "tensor": 4}
    assert mesh.axis_types == (AxisType.Explicit, AxisType.Explicit)


def test_a_mesh_of_one_device_keeps_its_data_axis():
    mesh = topology.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices())
    assert dict(mesh.shape) == {"data": 1} and mesh.size == 1


def test_devices_are_laid_out_row_by_row_with_tensor_innermost():
    devices = jax.devices()
    mesh = topology.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices)
    numbers = np.vectorize(devices.index)(mesh.devices)
    assert numbers.tolist() == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]

"""Axis sizes from what was asked and what there is, and the mesh made of them."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.mesh import topology


@pytest.mark.parametrize(
    ("asked", "devices", "sizes"),
    [
        ({}, 8, (8, 1, 1)),
        ({}, 1, (1, 1, 1)),
        ({"data": 2, "fsdp": -1}, 8, (2, 4, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 8, (2, 2, 2)),
        ({"data": 1, "tensor": -1}, 6, (1, 1, 6)),
        ({"data": 1, "fsdp": 2}, 8, (1, 2, 1)),
        ({"data": -1, "fsdp": 8}, 8, (1, 8, 1)),
    ],
)
def test_axis_sizes_fill_in_the_rest(asked, devices, sizes):
    assert tuple(topology.axis_sizes(config.Mesh(**asked), devices).values()) == sizes


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"data": 16}, "mesh: data=16 needs 16 devices, found 8; make an axis smaller .* fake_devices=16"),
        ({"fsdp": 16}, "mesh: fsdp=16 needs 16 devices, found 8"),
        ({"data": 4, "fsdp": 3}, "mesh: data=4 x fsdp=3 needs 12 devices, found 8"),
        ({"fsdp": 3}, "mesh: fsdp=3 does not divide the 8 devices here, .*mesh.data.*; take 2 or 4"),
        ({"fsdp": 3, "tensor": 2}, "mesh: fsdp=3 x tensor=2 does not divide the 8 devices here, .*; take 4 or 8"),
        ({"fsdp": -1}, "mesh.fsdp: only one axis may be -1, and mesh.data is"),
        ({"tensor": 0}, "mesh.tensor: must be above 0, or -1 .*, found 0"),
        ({"data": -2}, "mesh.data: must be above 0, or -1 .*, found -2"),
        ({"context": 2}, "mesh.context: must be 1, found 2"),
        ({"context": -1}, "mesh.context: must be 1, found -1"),
        ({"dcn_data": 2}, "mesh.dcn_data: must be 1, found 2"),
    ],
)
def test_axis_sizes_that_cannot_be_had_are_refused_with_the_numbers(asked, message):
    with pytest.raises(ConfigError, match=message):
        topology.axis_sizes(config.Mesh(**asked), 8)


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

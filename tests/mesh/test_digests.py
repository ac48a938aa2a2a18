"""Digests: the same on any mesh and in numpy, and another one for any change."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_dist.mesh import digests

RANDOM = np.random.default_rng(0)
ARRAYS = {
    "float32": (
        RANDOM.normal(size=(8, 6, 4)).astype(np.float32),
        [P(), P("fsdp", None, "tensor"), P(("data", "fsdp"))],
    ),
    "bfloat16": (RANDOM.normal(size=(16, 3)).astype(jnp.bfloat16), [P(), P(("fsdp", "tensor")), P("data")]),
    "bool": (RANDOM.integers(0, 2, (4, 4)).astype(bool), [P(), P(None, "data"), P("tensor", "data")]),
    "int8": (RANDOM.integers(-100, 100, (4, 4)).astype(np.int8), [P(), P("data", "fsdp")]),
    "uint32": (RANDOM.integers(0, 2**32, 2, np.uint32), [P(), P("data")]),
    "scalar": (np.int32(7), [P()]),
    "empty": (np.zeros((0, 4), np.float32), [P()]),
}


def on_devices(arrays, mesh, specs):
    """What each device says: [devices, arrays] of digests."""
    placed = [jax.device_put(array, NamedSharding(mesh, spec)) for array, spec in zip(arrays, specs, strict=True)]
    sums = np.asarray(digests.on_devices(mesh, tuple(specs))(*placed))
    return [[tuple(map(int, one)) for one in device] for device in sums]


@pytest.mark.parametrize("types", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 1), (4, 2, 1)])
def test_every_device_of_any_mesh_says_what_numpy_says(sizes, types):
    mesh = jax.make_mesh(
        sizes, ("data", "fsdp", "tensor"), axis_types=(types,) * 3, devices=jax.devices()[: np.prod(sizes)]
    )
    shapes = dict(zip(mesh.axis_names, sizes, strict=True))

    def divides(array, spec):
        parts = zip(array.shape, spec, strict=False)
        return all(
            not axes or size % np.prod([shapes[axis] for axis in np.atleast_1d(axes)]) == 0 for size, axes in parts
        )

    cases = [(array, spec) for array, specs in ARRAYS.values() for spec in specs if divides(array, spec)]
    arrays, specs = zip(*cases, strict=True)
    assert len(arrays) >= 12
    expected = [digests.of_numpy(np.asarray(array)) for array in arrays]
    assert on_devices(arrays, mesh, specs) == [expected] * mesh.size


def test_the_digests_of_one_seed_stay_what_checkpoints_hold():
    assert [digests.text(digests.of_numpy(np.asarray(array))) for array, _ in ARRAYS.values()] == [
        "32501ae7d8481379",
        "33aaa3485c41550e",
        "765674e513ce5389",
        "68670c2cd1992954",
        "72ef3ac2d1a46a52",
        "18c9aec418c9aec4",
        "0000000000000000",
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, jnp.bfloat16])
def test_shares_of_parts_add_up_to_the_digest_of_the_whole(dtype):
    whole = RANDOM.normal(size=(3, 50, 70, 11)).astype(dtype)
    cuts = [((0, 2), (2, 3)), ((0, 30), (30, 50)), ((0, 33), (33, 70)), ((0, 4), (4, 11))]
    shares = [
        digests.of_numpy(whole[tuple(slice(*cut) for cut in box)], whole.shape, [start for start, _ in box])
        for box in itertools.product(*cuts)
    ]
    assert digests.add(shares) == digests.of_numpy(whole)


def test_blocks_larger_than_those_that_are_hashed_at_a_time_are_counted_once():
    wide = RANDOM.normal(size=(2, 40, 5000)).astype(np.float32)
    parts = [
        digests.of_numpy(wide[:, :, :3000], wide.shape, (0, 0, 0)),
        digests.of_numpy(wide[:, :, 3000:], wide.shape, (0, 0, 3000)),
    ]
    assert digests.add(parts) == digests.of_numpy(wide) == digests.of_numpy(wide.reshape(-1))


def test_any_bit_and_any_exchange_of_two_elements_changes_the_digest():
    array = np.arange(1, 129, dtype=np.float32)
    seen = {digests.of_numpy(array)}
    for place, bit in itertools.product(range(128), range(32)):
        changed = array.copy()
        changed.view(np.uint32)[place] ^= np.uint32(1 << bit)
        seen.add(digests.of_numpy(changed))
    for one, other in itertools.combinations(range(128), 2):
        changed = array.copy()
        changed[[one, other]] = changed[[other, one]]
        seen.add(digests.of_numpy(changed))
    assert len(seen) == 1 + 128 * 32 + 128 * 127 // 2


def test_both_halves_of_a_digest_depend_on_every_element():
    zeros, ones = digests.of_numpy(np.zeros(1000, np.int8)), digests.of_numpy(np.ones(1000, np.int8))
    longer = digests.of_numpy(np.zeros(1001, np.int8))
    assert all(len({a, b, c}) == 3 for a, b, c in zip(zeros, ones, longer, strict=True))


def test_copies_that_differ_have_different_digests():
    mesh = jax.make_mesh((8,), ("data",))
    parts = [
        jax.device_put(np.float32([1, 2, 3 + (number == 5)]), device) for number, device in enumerate(mesh.devices)
    ]
    array = jax.make_array_from_single_device_arrays((3,), NamedSharding(mesh, P()), parts)
    found = [tuple(map(int, one[0])) for one in np.asarray(digests.on_devices(mesh, (P(),))(array))]
    assert [one == found[0] for one in found] == [True] * 5 + [False] + [True] * 2

"""Law 2 by what XLA compiled: who talks to whom, how often, and what a device holds."""

import functools
import math

import jax
import numpy as np
import pytest
from compiled import program_on, step_collectives
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from system import NO_AUGMENTATION, NO_DROPOUT

from vit_dist.plan.collectives import collectives

MESHES = {
    "data=8": {"data": 8},
    "data=4 x fsdp=2": {"data": 4, "fsdp": 2},
    "data=2 x fsdp=2 x tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
}


@functools.cache
def collectives_on(mesh, *overrides):
    """Of the train step compiled for one of `MESHES`."""
    return step_collectives(program_on(MESHES[mesh], *overrides, *NO_DROPOUT, *NO_AUGMENTATION))


def reductions_over_data(found):
    return [one for one in found if one.kind in ("all-reduce", "reduce-scatter") and "data" in one.axes]


@pytest.mark.parametrize("mesh", MESHES)
def test_four_micro_batches_are_reduced_over_data_as_often_as_one(mesh):
    one, four = (reductions_over_data(collectives_on(mesh, f"accumulate_steps={count}")) for count in (1, 4))
    exactly = [sum(each.axes == ("data",) for each in found) for found in (one, four)]
    assert exactly[0] == exactly[1] > 0
    assert len(one) == len(four)
    assert sum(each.bytes for each in one) == sum(each.bytes for each in four)


@pytest.mark.parametrize("gather", ["step", "microbatch"])
@pytest.mark.parametrize("mesh", MESHES)
def test_nothing_crosses_data_inside_the_loop_over_micro_batches(mesh, gather):
    found = collectives_on(mesh, "accumulate_steps=4", *(["accumulate_gather=step"] if gather == "step" else []))
    assert reductions_over_data(found)
    assert {one.loops for one in found if "data" in one.axes} == {0}


@pytest.mark.parametrize("mesh", ["data=4 x fsdp=2", "data=2 x fsdp=2 x tensor=2"])
def test_parameters_are_gathered_once_a_step_or_in_each_micro_batch_as_asked(mesh):
    for gather, inside in (("step", False), ("microbatch", True)):
        overrides = ("accumulate_steps=4", *(["accumulate_gather=step"] if gather == "step" else []))
        over_fsdp = [one for one in collectives_on(mesh, *overrides) if one.axes == ("fsdp",)]
        assert any(one.loops for one in over_fsdp) is inside


def test_no_device_holds_more_than_its_eighth_of_a_b16_and_its_optimizer():
    program = program_on(
        {"fsdp": 8}, "model.variant=B/16", "model.width=null", "model.depth=null", "model.mlp=null", "model.heads=null",
        "model.image_size=224", "model.patch_size=null", "model.channels=3", "model.num_classes=1000",
        "data.crop_area=null",
    )  # fmt: skip
    with program.in_use():
        state = program.abstract_state()
        leaves = jax.tree.leaves((state.parameters, state.optimizer))
        own = [leaf.sharding.shard_shape(leaf.shape) if leaf.ndim else () for leaf in leaves]
    whole = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    held = sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(own, leaves, strict=True))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.parameters))
    assert whole == pytest.approx(parameters * 4 * 3, rel=1e-3)  # AdamW's two moments beside each parameter
    assert parameters > 85_000_000
    assert held <= whole / 8 * 1.05


@pytest.fixture(scope="module")
def fully_sharded():
    """A wider model born on fsdp=8, and its abstract state."""
    program = program_on({"fsdp": 8}, "model.width=128", "model.mlp=512", "ema_decay=0.9")
    with program.in_use():
        yield program.new_state(), program.abstract_state()


def test_the_shards_that_devices_really_hold_are_an_eighth(fully_sharded):
    leaves = jax.tree.leaves((fully_sharded[0].parameters, fully_sharded[0].optimizer))
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert len(held) == 8
    assert max(held.values()) <= sum(leaf.nbytes for leaf in leaves) / 8 * 1.05


def test_the_type_of_every_parameter_says_how_it_is_split(fully_sharded):
    state, abstract = fully_sharded
    kernels = 0
    for path, leaf in jax.tree.leaves_with_path(state.parameters):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        kind = jax.typeof(leaf).sharding
        assert kind.mesh.axis_types == (AxisType.Explicit,), name
        assert kind.spec == leaf.sharding.spec, name
        if name.endswith("kernel"):
            kernels += 1
            assert "fsdp" in kind.spec, name
            assert math.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == leaf.size, name
    assert kernels >= 5


def test_a_state_is_born_as_its_abstract_state_says(fully_sharded):
    state, abstract = fully_sharded
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for born, said in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (born.shape, born.dtype) == (said.shape, said.dtype)
        assert jax.typeof(born).sharding.spec == (said.sharding.spec if said.ndim else P())


def test_moments_and_average_are_split_as_their_parameters_are(fully_sharded):
    state = fully_sharded[0]
    specs = [jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(state.parameters)]
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert [jax.typeof(leaf).sharding.spec for leaf in moments] == specs * 2  # AdamW's mean, then its square
    assert [jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(state.ema)] == specs


def test_birth_needs_no_whole_parameter_on_any_device():
    program = program_on({"fsdp": 8}, "model.width=128", "model.mlp=512")
    with program.in_use():
        text = jax.jit(program._make_state).lower().compile().as_text()
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract_state().parameters)]
    moved = [one.bytes for one in collectives(text, {"fsdp": 8}) if one.kind == "all-gather"]
    assert max(moved, default=0) < max(sizes) / 8
    assert np.sum(moved) < np.sum(sizes) / 8

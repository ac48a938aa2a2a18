"""Law 2 by what XLA compiled: who talks to whom, how often, and what a device holds."""

import functools
import math

import jax
import numpy as np
import pytest
from compiled import program_on, step_collectives
from hlo import KINDS, axes_of, collectives
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from system import NO_AUGMENTATION, NO_DROPOUT

MESHES = {
    "data=8": {"data": 8},
    "data=4 x fsdp=2": {"data": 4, "fsdp": 2},
    "data=2 x fsdp=2 x tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
}
CUBE = MESHES["data=2 x fsdp=2 x tensor=2"]


@functools.cache
def collectives_on(mesh, *overrides):
    """Of the train step compiled for one of `MESHES`."""
    return step_collectives(program_on(MESHES[mesh], *overrides, *NO_DROPOUT, *NO_AUGMENTATION))


def reductions_over_data(found):
    return [one for one in found if one.kind in ("all-reduce", "reduce-scatter") and "data" in one.axes]


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("tensor",)),
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", ("fsdp",)),
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("data", "fsdp")),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
        ("replica_groups=[4,2]<=[8]", ("tensor",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", ("fsdp",)),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("data", "fsdp")),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}", ("data", "fsdp", "tensor")),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("data", "fsdp")),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}", ("fsdp",)),
        ("replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'data','tensor'}", ("data", "tensor")),
        ("source_target_pairs={{0,4},{4,0},{1,5},{5,1}}", ("data",)),
        ("source_target_pairs={{0,6},{6,0}}", ("data", "fsdp")),
    ],
)
def test_the_axes_of_a_collective_are_read_from_its_groups(groups, axes):
    assert axes_of(f"  %one = f32[4]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add", CUBE) == axes


def test_groups_that_are_no_product_of_axes_are_refused():
    with pytest.raises(ValueError, match="no product of the axes"):
        axes_of("replica_groups={{0,3},{1,2},{4,7},{5,6}}", CUBE)


def test_loops_around_a_collective_are_counted():
    text = """HloModule jit_f, num_partitions=8
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}
%always (p: f32[4]) -> pred[] {
  ROOT %yes = pred[] constant(true)
}
%inner (p: f32[4]) -> f32[4] {
  ROOT %all-reduce.1 = f32[4]{0} all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}
%outer (p: f32[4]) -> f32[4] {
  ROOT %while.1 = f32[4]{0} while(%p), condition=%always, body=%inner
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %while.2 = f32[4]{0} while(%p), condition=%always, body=%outer
  ROOT %both = (f32[4]{0}, /*index=1*/bf16[2,3]{1,0}) all-reduce-start(%p, %q), replica_groups={}, to_apply=%add
}
"""
    inside, outside = sorted(collectives(text, CUBE), key=lambda one: -one.loops)
    assert (inside.kind, inside.axes, inside.bytes, inside.loops) == ("all-reduce", ("tensor",), 16, 2)
    assert (outside.axes, outside.bytes, outside.loops) == (("data", "fsdp", "tensor"), 16 + 12, 0)
    assert outside.kind in KINDS


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

"""Collectives of the compiled step: which devices communicate, how often, and what each device stores."""

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
    """The collectives of the train step compiled for one of `MESHES`."""
    return step_collectives(program_on(MESHES[mesh], *overrides, *NO_DROPOUT, *NO_AUGMENTATION))


def reductions_over_data(step):
    return [op for op in step if op.kind in ("all-reduce", "reduce-scatter") and "data" in op.axes]


@pytest.mark.parametrize("mesh", MESHES)
def test_four_micro_batches_are_reduced_over_data_as_often_as_one(mesh):
    one, four = (reductions_over_data(collectives_on(mesh, f"accumulate_steps={count}")) for count in (1, 4))
    over_data_only = [sum(op.axes == ("data",) for op in step) for step in (one, four)]
    assert over_data_only[0] == over_data_only[1] > 0
    assert len(one) == len(four)
    assert sum(op.bytes for op in one) == sum(op.bytes for op in four)


@pytest.mark.parametrize("gather", ["step", "microbatch"])
@pytest.mark.parametrize("mesh", MESHES)
def test_nothing_crosses_data_inside_the_loop_over_micro_batches(mesh, gather):
    step = collectives_on(mesh, "accumulate_steps=4", *(["accumulate_gather=step"] if gather == "step" else []))
    assert reductions_over_data(step)
    assert {op.loops for op in step if "data" in op.axes} == {0}


@pytest.mark.parametrize("mesh", ["data=4 x fsdp=2", "data=2 x fsdp=2 x tensor=2"])
def test_parameters_are_gathered_once_a_step_or_in_each_micro_batch_as_asked(mesh):
    for gather, inside in (("step", False), ("microbatch", True)):
        overrides = ("accumulate_steps=4", *(["accumulate_gather=step"] if gather == "step" else []))
        over_fsdp = [op for op in collectives_on(mesh, *overrides) if op.axes == ("fsdp",)]
        assert any(op.loops for op in over_fsdp) is inside


def test_no_device_holds_more_than_its_eighth_of_a_b16_and_its_optimizer():
    program = program_on(
        {"fsdp": 8}, "model.variant=B/16", "model.width=null", "model.depth=null", "model.mlp=null", "model.heads=null",
        "model.image_size=224", "model.patch_size=null", "model.channels=3", "model.num_classes=1000",
        "data.crop_area=null",
    )  # fmt: skip
    with program.in_use():
        state = program.abstract_state()
        leaves = jax.tree.leaves((state.parameters, state.optimizer))
        shards = [leaf.sharding.shard_shape(leaf.shape) if leaf.ndim else () for leaf in leaves]
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    held = sum(math.prod(shape) * leaf.dtype.itemsize for shape, leaf in zip(shards, leaves, strict=True))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.parameters))
    assert total == pytest.approx(parameters * 4 * 3, rel=1e-3)  # AdamW's two moments beside each parameter
    assert parameters > 85_000_000
    assert held <= total / 8 * 1.05


@pytest.fixture(scope="module")
def fully_sharded():
    """The new state of a wider model on fsdp=8, and its abstract state."""
    program = program_on({"fsdp": 8}, "model.width=128", "model.mlp=512", "ema_decay=0.9")
    with program.in_use():
        yield program.new_state(), program.abstract_state()


def test_each_device_stores_an_eighth_of_the_state(fully_sharded):
    leaves = jax.tree.leaves((fully_sharded[0].parameters, fully_sharded[0].optimizer))
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in leaves:
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert len(held) == 8
    assert max(held.values()) <= sum(leaf.nbytes for leaf in leaves) / 8 * 1.05


def test_the_type_of_every_parameter_holds_its_sharding(fully_sharded):
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


def test_a_new_state_has_the_shardings_of_the_abstract_state(fully_sharded):
    state, abstract = fully_sharded
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        assert jax.typeof(leaf).sharding.spec == (expected.sharding.spec if expected.ndim else P())


def test_moments_and_average_are_split_as_their_parameters_are(fully_sharded):
    state = fully_sharded[0]
    specs = [jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(state.parameters)]
    moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert [jax.typeof(leaf).sharding.spec for leaf in moments] == specs * 2  # AdamW's mean, then its square
    assert [jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(state.ema)] == specs


def test_initialisation_puts_no_full_parameter_on_any_device():
    program = program_on({"fsdp": 8}, "model.width=128", "model.mlp=512")
    with program.in_use():
        text = jax.jit(program._make_state).lower().compile().as_text()
        sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(program.abstract_state().parameters)]
    moved = [op.bytes for op in collectives(text, {"fsdp": 8}) if op.kind == "all-gather"]
    assert max(moved, default=0) < max(sizes) / 8
    assert np.sum(moved) < np.sum(sizes) / 8

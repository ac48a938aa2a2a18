"""Memory, work and talk of a layout, by hand and against the program that is compiled for it."""

import math

import jax
import pytest
from compiled import compiled_step, program_on
from system import NOTHING_RANDOM, settings

from vit_dist.describe import bytes_per_device
from vit_dist.model.flops import hardware_flops, training_flops
from vit_dist.plan.collectives import Collective, collectives, sent
from vit_dist.plan.estimate.communication import step_collectives
from vit_dist.plan.estimate.step import Wires, estimate, wires_of
from vit_dist.plan.estimate.workload import state_bytes_of, workload_of
from vit_dist.plan.targets import Chip

# 1 GB/s over the wires within, 0.1 GB/s over the network.
GPU = Chip("one", "NVIDIA H200", "gpu", 10**9, 1e12, "NVLink", 1e9, 0, 1e8, "none")

ONCE, IN_MICRO_BATCHES = ("model.remat=none",), ("model.remat=block", "accumulate_steps=2")


def load_on(sizes, *overrides, platform="gpu"):
    asked = settings(*overrides)
    return workload_of(asked, platform, sizes, state_bytes_of(asked))


def estimate_on(sizes, *overrides):
    asked = settings(*overrides)
    links = dict.fromkeys((("fsdp",), ("data",), ("tensor",), ("data", "fsdp")), ("NVLink", 1e9))
    return estimate(asked, GPU, Wires(sizes, links), state_bytes_of(asked))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_the_state_of_a_device_is_exact(name):
    extra = (f"optimizer.name={name}", "ema_decay=0.9", "optimizer.moment_dtype=bfloat16", "model.pool=map")
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    program = program_on(sizes, *extra)
    with program.in_use():
        state, batch = program.abstract_state(), program.abstract_batch()
    memory = estimate_on(sizes, *extra).memory
    parts = {
        "parameters": state.parameters, "optimizer": (state.optimizer, state.step), "ema": state.ema, "batch": batch
    }  # fmt: skip
    for part, tree in parts.items():
        assert memory[part] == sum(map(bytes_per_device, jax.tree.leaves(tree))), part


def test_gradients_and_gathered_parameters_by_hand():
    bfloat16 = ("model.dtype=bfloat16", "model.remat=none")
    held = state_bytes_of(settings())
    blocks, others = sum(held.blocks.values()), sum(held.others.values())
    alone = estimate_on({}, *bfloat16).memory
    assert alone["gradients"] == blocks + others == alone["parameters"]
    assert alone["gathered"] == blocks / 2  # the products' own copy
    assert estimate_on({}, "model.remat=none").memory["gathered"] == 0  # in float32 there is none
    both = estimate_on({}, *bfloat16, "accumulate_steps=2").memory
    assert both["gradients"] == 2 * alone["gradients"]  # a sum and what is added to it
    split = load_on({"fsdp": 2}, *bfloat16)
    assert split.own(held.blocks) == pytest.approx(blocks / 2, rel=0.02)  # a few biases are whole
    assert split.gathered(held.blocks) == blocks
    again = estimate_on({"fsdp": 2}, "model.dtype=bfloat16", "model.remat=block").memory
    assert again["gathered"] == split.own(held.blocks) / 2  # cast, and gathered a block at a time


def test_activations_by_hand():
    # 64 examples of 4 tokens; a block keeps its input of 32 float32 numbers a token, twice.
    memory = estimate_on({"data": 2}, "model.remat=block").memory
    assert memory["activations"] == 2 * (64 / 2) * 4 * 32 * 4
    micro = estimate_on({"data": 2}, "model.remat=block", "accumulate_steps=4").memory
    assert micro["activations"] == memory["activations"] / 4
    # With parameters to gather, the GPUs' compiler begins the next micro-batch early; a TPU's does not.
    gathering = estimate_on({"fsdp": 2}, "model.remat=block", "accumulate_steps=4").memory
    assert gathering["activations"] == memory["activations"] / 2


def test_products_are_split_but_for_the_head_and_the_embedding():
    asked = settings("model.remat=block", *NOTHING_RANDOM)
    model = asked.model
    outside = 3 * 2 * (4 * 16 * 32 + 32 * 10)  # 4 patches of 16 pixels; 10 classes; forward once, backward twice
    blocks = hardware_flops(model) - outside
    assert training_flops(model) < hardware_flops(model)
    assert estimate_on({}, "model.remat=block", *NOTHING_RANDOM).work.flops == 64 * (blocks + outside)
    on_eight = estimate_on({"data": 2, "tensor": 4}, "model.remat=block", *NOTHING_RANDOM).work.flops
    assert on_eight == 32 * (blocks / 4 + outside)


def test_the_update_reads_and_writes_the_state():
    asked, one = settings(*NOTHING_RANDOM), estimate_on({}, *NOTHING_RANDOM, "batch_size=8").work.other_bytes
    two = estimate_on({}, *NOTHING_RANDOM, "batch_size=16").work.other_bytes
    held = state_bytes_of(asked)
    parameters = sum(held.blocks.values()) + sum(held.others.values())
    state = parameters + sum(held.optimizer.values())
    assert 2 * one - two == pytest.approx(2 * state + 3 * parameters)  # what does not grow with the batch


def test_a_tensor_group_sums_activations_four_times_a_block():
    load = load_on({"tensor": 4}, *NOTHING_RANDOM, "model.remat=none")
    one = 64 * 4 * 32 * 4  # examples, tokens, width, bytes
    assert step_collectives(load) == [Collective("all-reduce", ("tensor",), one, 4 * 2, 1)]
    again = load_on({"tensor": 4}, *NOTHING_RANDOM, "model.remat=block", "accumulate_steps=2")
    assert step_collectives(again) == [Collective("all-reduce", ("tensor",), one // 2, 5 * 2 * 2, 2)]
    parallel = load_on({"tensor": 4}, *NOTHING_RANDOM, "model.remat=block", "model.parallel=true")
    assert step_collectives(parallel) == [Collective("all-reduce", ("tensor",), one, 3 * 2, 1)]


def test_replicas_sum_gradients_once_a_step_as_parameters_lie():
    load = load_on({"dcn_data": 2, "data": 2, "fsdp": 2}, *NOTHING_RANDOM, "accumulate_steps=4")
    sums = [one for one in step_collectives(load) if one.axes == ("dcn_data", "data")]
    own = load.own(load.held.blocks) + load.own(load.held.others)
    assert sums == [Collective("all-reduce", ("dcn_data", "data"), round(own), 1, 0)]


@pytest.mark.parametrize(
    ("sizes", "extra"),
    [
        ({"fsdp": 4}, ONCE),
        ({"tensor": 4}, IN_MICRO_BATCHES),
        ({"data": 2, "fsdp": 2}, ONCE),
        ({"data": 2, "fsdp": 2}, IN_MICRO_BATCHES),
        pytest.param({"fsdp": 4}, IN_MICRO_BATCHES, marks=pytest.mark.slow),
        pytest.param({"tensor": 4}, ONCE, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_devices_send_what_the_compiled_step_sends(sizes, extra):
    overrides = (*NOTHING_RANDOM, *extra, "optimizer.clip=null", "model.width=64", "model.mlp=256")
    program = program_on(sizes, *overrides)
    found = collectives(compiled_step(program).as_text(), dict(program.mesh.shape))
    load = load_on(sizes, *overrides, platform="cpu")

    def by_axes(several):
        total = dict.fromkeys([(axis,) for axis in sizes], 0.0)
        for one in several:
            scattered = one.kind == "all-reduce" and one.axes == ("fsdp",)  # a CPU sums all to keep a part
            share = 0.5 if scattered else 1.0
            if one.axes in total:
                total[one.axes] += share * one.count * sent(one, math.prod(sizes[axis] for axis in one.axes))
        return total

    assert by_axes(step_collectives(load)) == pytest.approx(by_axes(found), rel=0.03)


def test_what_is_said_between_blocks_hides_and_what_a_product_waits_for_does_not():
    transfers = estimate_on({"fsdp": 2, "tensor": 2}, *NOTHING_RANDOM, "model.remat=none").work.transfers
    assert [talk.hides for talk in transfers] == [
        True,
        True,
        False,
        False,
        False,
    ]  # blocks, then embedding and head; sums
    load = load_on({"fsdp": 2, "tensor": 2}, *NOTHING_RANDOM, "model.remat=none")
    gathered, summed = step_collectives(load)[0], step_collectives(load)[-1]
    assert transfers[0].seconds == pytest.approx(gathered.count * gathered.bytes / 2 / 1e9)
    assert transfers[-1].seconds == pytest.approx(summed.count * summed.bytes / 1e9)
    unrolled = estimate_on({"fsdp": 2}, *NOTHING_RANDOM, "model.scan=false").work.transfers
    assert all(talk.hides for talk in unrolled)


def test_the_wires_are_those_of_the_mesh():
    program = program_on({"data": 2, "fsdp": 2, "tensor": 2})
    wires = wires_of(program.mesh, GPU)
    assert wires.sizes == {"data": 2, "fsdp": 2, "tensor": 2}
    assert wires.links[("tensor",)] == ("NVLink", 1e9)
    assert set(wires.links) >= {("data",), ("fsdp",), ("tensor",), ("data", "fsdp")}

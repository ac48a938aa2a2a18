"""Memory, cost and collectives of a layout, by hand and against the program that is compiled for it."""

import dataclasses
import math

import pytest
from compiled import compiled_step, program_on
from system import NOTHING_RANDOM, settings

from vit_dist.mesh.layout import bytes_per_device
from vit_dist.model.flops import hardware_flops, training_flops
from vit_dist.plan.collectives import Collective, bytes_sent, collectives
from vit_dist.plan.estimate.communication import step_collectives
from vit_dist.plan.estimate.step import MeshLinks, estimate, mesh_links
from vit_dist.plan.estimate.workload import device_workload, state_bytes
from vit_dist.plan.links import Link
from vit_dist.plan.targets import Chip

# 1 GB/s over NVLink, 0.1 GB/s over the network.
GPU = Chip("one", "NVIDIA H200", "gpu", 10**9, 1e12, "NVLink", 1e9, 0, 1e8, "none")
CPU = dataclasses.replace(GPU, kind="cpu", platform="cpu")

ONCE, IN_MICRO_BATCHES = ("model.remat=none",), ("model.remat=block", "accumulate_steps=2")


def workload_on(sizes, *overrides, chip=GPU):
    config = settings(*overrides)
    return device_workload(config, chip, sizes, state_bytes(config))


def estimate_on(sizes, *overrides):
    config = settings(*overrides)
    links = dict.fromkeys((("fsdp",), ("data",), ("tensor",), ("data", "fsdp")), Link("NVLink", 1e9))
    return estimate(config, GPU, MeshLinks(sizes, links), state_bytes(config))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_the_state_of_a_device_is_exact(name):
    extra = (f"optimizer.name={name}", "ema_decay=0.9", "optimizer.moment_dtype=bfloat16", "model.pool=map")
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    program = program_on(sizes, *extra)
    with program.in_use():
        state, batch = program.abstract_state(), program.abstract_batch()
    memory = estimate_on(sizes, *extra).memory
    trees = {
        "parameters": state.parameters, "optimizer": (state.optimizer, state.step), "ema": state.ema, "batch": batch
    }  # fmt: skip
    for name, tree in trees.items():
        assert memory[name] == bytes_per_device(tree), name


def test_gradients_and_gathered_parameters_by_hand():
    bfloat16 = ("model.dtype=bfloat16", "model.remat=none")
    state = state_bytes(settings())
    blocks, others = sum(state.blocks.values()), sum(state.others.values())
    alone = estimate_on({}, *bfloat16).memory
    assert alone["gradients"] == blocks + others == alone["parameters"]
    assert alone["gathered"] == blocks / 2  # the products' own copy
    assert estimate_on({}, "model.remat=none").memory["gathered"] == 0  # in float32 there is none
    both = estimate_on({}, *bfloat16, "accumulate_steps=2").memory
    assert both["gradients"] == 2 * alone["gradients"]  # a sum and what is added to it
    split = workload_on({"fsdp": 2}, *bfloat16)
    assert split.device_bytes(state.blocks) == pytest.approx(blocks / 2, rel=0.02)  # a few biases are not split
    assert split.gathered_bytes(state.blocks) == blocks
    again = estimate_on({"fsdp": 2}, "model.dtype=bfloat16", "model.remat=block").memory
    assert again["gathered"] == split.device_bytes(state.blocks) / 2  # cast, and gathered a block at a time


def test_activations_by_hand():
    # 64 examples of 4 tokens; a block keeps its input of 32 float32 numbers a token, twice.
    memory = estimate_on({"data": 2}, "model.remat=block").memory
    assert memory["activations"] == 2 * (64 / 2) * 4 * 32 * 4
    micro = estimate_on({"data": 2}, "model.remat=block", "accumulate_steps=4").memory
    assert micro["activations"] == memory["activations"] / 4


def test_products_are_split_but_for_the_head_and_the_embedding():
    config = settings("model.remat=block", *NOTHING_RANDOM)
    model = config.model
    outside = 3 * 2 * (4 * 16 * 32 + 32 * 10)  # 4 patches of 16 pixels; 10 classes; forward once, backward twice
    blocks = hardware_flops(model) - outside
    assert training_flops(model) < hardware_flops(model)
    assert estimate_on({}, "model.remat=block", *NOTHING_RANDOM).cost.flops == 64 * (blocks + outside)
    on_eight = estimate_on({"data": 2, "tensor": 4}, "model.remat=block", *NOTHING_RANDOM).cost.flops
    assert on_eight == 32 * (blocks / 4 + outside)


def test_the_update_reads_and_writes_the_state():
    eight = estimate_on({}, *NOTHING_RANDOM, "batch_size=8").cost.other_bytes
    sixteen = estimate_on({}, *NOTHING_RANDOM, "batch_size=16").cost.other_bytes
    state = state_bytes(settings(*NOTHING_RANDOM))
    parameters = sum(state.blocks.values()) + sum(state.others.values())
    total = parameters + sum(state.optimizer.values())
    assert 2 * eight - sixteen == pytest.approx(2 * total + 3 * parameters)  # what does not grow with the batch


def test_a_tensor_group_sums_activations_four_times_a_block_and_the_gradients_of_its_norms():
    def sums(count, size, loops):
        return Collective("all-reduce", ("tensor",), size, count, loops)

    work = workload_on({"tensor": 4}, *NOTHING_RANDOM, "model.remat=none")
    activations, norm = 64 * 4 * 32 * 4, 2 * 32 * 4  # bytes of examples, tokens, width; of scale and bias
    assert step_collectives(work) == [sums(4 * 2, activations, 1), sums(2, 2 * norm, 1)]
    again = workload_on({"tensor": 4}, *NOTHING_RANDOM, "model.remat=block", "accumulate_steps=2")
    assert step_collectives(again) == [sums(5 * 2 * 2, activations // 2, 2), sums(2 * 2, 2 * norm, 2)]
    parallel = workload_on({"tensor": 4}, *NOTHING_RANDOM, "model.remat=block", "model.parallel=true")
    assert step_collectives(parallel) == [sums(3 * 2, activations, 1), sums(2, norm, 1)]


def test_replicas_sum_their_shards_of_the_gradients_once_a_step():
    work = workload_on({"dcn_data": 2, "data": 2, "fsdp": 2}, *NOTHING_RANDOM, "accumulate_steps=4")
    sums = [collective for collective in step_collectives(work) if "data" in collective.axes]
    local = work.device_bytes(work.state.blocks) + work.device_bytes(work.state.others)
    biases = 4 * (2 * (3 * 32 + 64) + 10)  # of qkv and up in two blocks, and of the head: fsdp does not split them
    assert sums == [
        Collective("all-reduce", ("dcn_data", "data"), round(local) - biases, 1, 0),
        Collective("all-reduce", ("dcn_data", "data", "fsdp"), biases, 1, 0),
    ]


@pytest.mark.parametrize(
    ("extra", "pixel"),
    [
        (("batch_size=24",), 1),
        (("batch_size=24", "data.rotate=10"), 4),
        (("data.repeats=8",), 1),  # groups of 16 rows on devices of 8
        (("data.repeats=4",), 0),
    ],
)
def test_images_are_gathered_if_partners_of_mixup_are_on_two_devices(extra, pixel):
    overrides = (*NOTHING_RANDOM, "mixup=0.1", "log_examples=false", *extra)
    program = program_on({"data": 8}, *overrides)
    compiled = collectives(compiled_step(program).as_text(), dict(program.mesh.shape))
    classes = 10 * 4  # of the targets, which are left out of the estimate
    gathers = [
        [one for one in several if one.kind == "all-gather"]
        for several in (step_collectives(workload_on({"data": 8}, *overrides)), compiled)
    ]
    rows = settings(*overrides).batch_size
    assert sum(one.bytes for one in gathers[0]) == rows * 64 * pixel
    assert sum(one.bytes for one in gathers[1]) == rows * (64 * pixel + classes * bool(pixel))


@pytest.mark.parametrize(
    ("sizes", "extra"),
    [
        ({"fsdp": 4}, ONCE),
        ({"tensor": 4}, IN_MICRO_BATCHES),
        ({"data": 2, "fsdp": 2}, ONCE),
        ({"data": 2, "fsdp": 2}, IN_MICRO_BATCHES),
        ({"fsdp": 2, "tensor": 2}, ("model.activation=swiglu", *ONCE)),
        ({"fsdp": 2, "tensor": 2}, ("model.layer_scale=0.1", "model.remat=block")),
        ({"fsdp": 2, "tensor": 2}, ("model.norm=rmsnorm", "model.position=rope2d", "model.pool_norm=after", *ONCE)),
        pytest.param({"fsdp": 4}, IN_MICRO_BATCHES, marks=pytest.mark.slow),
        pytest.param({"tensor": 4}, ONCE, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_devices_send_what_the_compiled_step_sends(sizes, extra):
    overrides = (*NOTHING_RANDOM, *extra, "optimizer.clip=null", "model.width=64", "model.mlp=256")
    program = program_on(sizes, *overrides)
    compiled = collectives(compiled_step(program).as_text(), dict(program.mesh.shape))
    work = workload_on(sizes, *overrides, chip=CPU)

    def by_axes(several):
        total = dict.fromkeys([(axis,) for axis in sizes], 0.0)
        for collective in several:
            axes = collective.axes
            # A CPU's compiler makes an all-reduce of a reduce-scatter, which sends twice as much.
            share = 0.5 if collective.kind == "all-reduce" and axes == ("fsdp",) else 1.0
            if axes in total:
                sent = bytes_sent(collective, math.prod(sizes[axis] for axis in axes))
                total[axes] += share * collective.count * sent
        return total

    assert by_axes(step_collectives(work)) == pytest.approx(by_axes(compiled), rel=0.005)


def test_collectives_of_blocks_overlap_and_those_that_a_product_waits_for_do_not():
    transfers = estimate_on({"fsdp": 2, "tensor": 2}, *NOTHING_RANDOM, "model.remat=none").cost.transfers
    # Parameters and gradients of the blocks; those of embedding and head, and of biases; biases that norms leave; sums
    # of activations and of norms' gradients over tensor.
    assert [transfer.overlaps for transfer in transfers] == [True, True, False, False, False, True, False, False]
    work = workload_on({"fsdp": 2, "tensor": 2}, *NOTHING_RANDOM, "model.remat=none")
    gathered, summed = step_collectives(work)[0], step_collectives(work)[-2]
    assert transfers[0].seconds == pytest.approx(gathered.count * gathered.bytes / 2 / 1e9)
    assert transfers[-2].seconds == pytest.approx(summed.count * summed.bytes / 1e9)
    unrolled = estimate_on({"fsdp": 2}, *NOTHING_RANDOM, "model.scan=false").cost.transfers
    assert all(transfer.overlaps for transfer in unrolled)


def test_the_links_are_those_of_the_mesh():
    program = program_on({"data": 2, "fsdp": 2, "tensor": 2})
    links = mesh_links(program.mesh, GPU)
    assert links.sizes == {"data": 2, "fsdp": 2, "tensor": 2}
    assert links.by_axes[("tensor",)] == ("NVLink", 1e9)
    assert set(links.by_axes) >= {("data",), ("fsdp",), ("tensor",), ("data", "fsdp")}

"""The collectives of a compiled step: sizes computed by hand, and how each platform's compiler rewrites them."""

import functools

import pytest
from compiled import program_on, step_collectives
from system import NO_AUGMENTATION, NO_DROPOUT

from vit_dist.plan.collectives import KINDS, Collective, bytes_sent, collective_axes, collectives

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}

# Parameters of tiny.py, whose width is 32: those that `fsdp` splits, and biases over heads or the MLP, which it leaves.
DEPTH = 2
BLOCK_NORMS = 4 * 32  # scale and bias of both norms: folded into kernels as they are stored, and never gathered
BLOCK_DENSE = 32 * 96 + (32 * 32 + 32) + 32 * 64 + (64 * 32 + 32)  # qkv, projection, up, down
BLOCK_UNSPLIT = 96 + 64  # of qkv and up, the layers after the norms
OTHER_SPLIT = (16 * 32 + 32) + 4 * 32 + 2 * 32 + 32 * 10  # patches, positions, last norm, head
OTHER_UNSPLIT = 10
SPLIT = DEPTH * (BLOCK_NORMS + BLOCK_DENSE) + OTHER_SPLIT
UNSPLIT = DEPTH * BLOCK_UNSPLIT + OTHER_UNSPLIT
# A norm's bias b becomes b W in the bias of the layer after it, a sum over what splits the rows of W; and so does the
# gradient of b W, of which every device needs the whole for its rows of W.
BLOCK_FOLDED = BLOCK_UNSPLIT
IDS = 64 * 4  # the examples' int32 ids, gathered for the log

MAIN = "ENTRY %main (p: f32[4]) -> f32[4] {{\n{}\n}}\n"


@functools.cache
def step(*overrides, **sizes):
    """The collectives of tiny.py's training step on a mesh of these sizes."""
    return step_collectives(program_on(sizes, *overrides, *NO_DROPOUT, *NO_AUGMENTATION))


def total(found, kind, **where):
    """Bytes a step of the collectives of this kind whose fields are as given."""
    chosen = [
        collective
        for collective in found
        if collective.kind == kind and all(getattr(collective, key) == is_ for key, is_ in where.items())
    ]
    return sum(collective.bytes * collective.count for collective in chosen)


def test_replicas_sum_every_gradient_once_and_the_loss():
    found = step(data=8)
    assert {(collective.axes, collective.count, collective.loops) for collective in found} == {(("data",), 1, 0)}
    assert total(found, "all-reduce") == 4 * (SPLIT + UNSPLIT) + 4
    assert total(found, "all-gather") == IDS


def test_split_parameters_are_gathered_once_and_kept_for_the_backward_pass():
    found = step(fsdp=8)
    assert {collective.axes for collective in found} == {("fsdp",)}
    assert total(found, "all-gather", loops=0) == 4 * OTHER_SPLIT + IDS
    assert total(found, "all-gather", loops=1) == 4 * DEPTH * BLOCK_DENSE
    assert {collective.count for collective in found if collective.loops == 1} == {DEPTH}


def test_blocks_that_are_computed_again_gather_their_parameters_again():
    found = step("model.remat=block", fsdp=8)
    last_bias = 32  # of `down`: no gradient needs what it is added to
    assert total(found, "all-gather", loops=1) == 4 * DEPTH * (2 * BLOCK_DENSE - last_bias)
    assert total(found, "all-gather", loops=0) == 4 * OTHER_SPLIT + IDS


def test_gradients_of_split_parameters_are_summed_over_what_splits_them():
    found = step(fsdp=8)
    # A CPU's compiler makes no reduce-scatters: every device gets the whole sum and cuts its part from it.
    assert total(found, "all-reduce", loops=1) == 4 * DEPTH * (BLOCK_DENSE + 2 * BLOCK_FOLDED)
    # Outside: the gradients of what is no block; those of all biases that are not split, as one array; the loss; and
    # the norms of gradients, to clip and to log them, and of parameters.
    scalars = 1 + 2
    assert total(found, "all-reduce", loops=0) == 4 * (OTHER_SPLIT + UNSPLIT + scalars)


def test_tensor_sums_activations_twice_a_block_in_each_pass():
    found = step(tensor=8)
    inside = [collective for collective in found if collective.loops]
    activations = 64 * 4 * 32 * 4  # [B, N, D] in float32
    # The gradients of the norms are sums over the columns of kernels, which tensor splits; they go with the last sum.
    sizes = [activations, activations, activations, activations + 4 * BLOCK_NORMS]
    assert inside == [Collective("all-reduce", ("tensor",), size, DEPTH, 1) for size in sizes]
    assert total(found, "all-reduce", loops=0) == 4 * 2  # the norms of gradients and of parameters


def test_mixup_moves_no_image_if_devices_hold_whole_groups_of_partners():
    bare = step(data=8)
    mixed = step_collectives(program_on({"data": 8}, *NO_DROPOUT, *NO_AUGMENTATION, "mixup=0.1"))
    assert sorted(mixed, key=str) == sorted(bare, key=str)


def test_micro_batches_are_gathered_for_each_and_summed_over_data_once():
    single, four = step(data=4, fsdp=2), step("accumulate_steps=4", data=4, fsdp=2)
    for found in (single, four):
        assert total(found, "all-reduce", axes=("data",)) == 4 * SPLIT // 2
        assert total(found, "all-reduce", axes=("data", "fsdp")) == 4 * (UNSPLIT + 1)  # and the loss
        assert {(collective.loops, collective.count) for collective in found if "data" in collective.axes} == {(0, 1)}
    assert total(four, "all-gather", loops=2) == 4 * total(single, "all-gather", loops=1) == 4 * 4 * DEPTH * BLOCK_DENSE
    assert {collective.count for collective in four if collective.loops == 2} == {4 * DEPTH}


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
    assert collective_axes(f"  %one = f32[4]{{0}} all-reduce(%x), channel_id=1, {groups}, to_apply=%add", CUBE) == axes


def test_groups_that_are_no_product_of_axes_are_refused():
    with pytest.raises(ValueError, match="are not groups along axes"):
        collective_axes("replica_groups={{0,3},{1,2},{4,7},{5,6}}", CUBE)


def test_a_program_for_another_mesh_is_refused():
    text = "HloModule jit_f, num_partitions=4\n" + MAIN.format("  ROOT %p = f32[4]{0} parameter(0)")
    with pytest.raises(ValueError, match="4 partitions is for another mesh"):
        collectives(text, CUBE)


def test_loops_around_a_collective_are_counted_by_what_is_known_of_them():
    text = """HloModule jit_f, num_partitions=8
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}
%always (p: f32[4]) -> pred[] {
  ROOT %yes = pred[] constant(true)
}
%below (p: (s32[], f32[4])) -> pred[] {
  %p = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %n = s32[]{:T(128)} constant(24), metadata={op_name="jit(step)/while/cond/lt"}
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}
%inner (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %all-reduce.1 = f32[4]{0} all-reduce(%p), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}
%outer (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %while.1 = f32[4]{0} while(%p), condition=%below, body=%inner
}
%unknown (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %all-to-all.1 = f32[4]{0} all-to-all(%p), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}
}
ENTRY %main (p: f32[4], q: bf16[2,3]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %q = bf16[2,3]{1,0} parameter(1)
  %while.2 = f32[4]{0} while(%p), condition=%always, body=%outer, backend_config={"known_trip_count":{"n":"5"}}
  %while.3 = f32[4]{0} while(%p), condition=%always, body=%unknown
  ROOT %both = (f32[4]{0}, /*index=1*/bf16[2,3]{1,0}) all-reduce(%p, %q), replica_groups={}, to_apply=%add
}
"""
    assert sorted(collectives(text, CUBE), key=lambda collective: collective.kind + str(collective.loops)) == [
        Collective("all-reduce", ("data", "fsdp", "tensor"), 16 + 12, 1, 0),
        Collective("all-reduce", ("tensor",), 16, 5 * 24, 2),
        Collective("all-to-all", ("data",), 16, 1, 1),
    ]


def test_both_halves_of_an_asynchronous_collective_are_one():
    """As a GPU's compiler writes them, and jax 0.12's a sum: the first half's type is not to be relied upon."""
    text = """HloModule jit_step, num_partitions=8
ENTRY %main (p: bf16[8,64], q: f32[4], r: f32[16], s: f32[16]) -> f32[16] {
  %p = bf16[8,64]{1,0} parameter(0)
  %q = f32[4]{0} parameter(1)
  %r = f32[16]{0} parameter(2)
  %ag = ((bf16[8,64]{1,0}, f32[4]{0}), (bf16[16,64]{1,0}, f32[8]{0})) all-gather-start(%p, %q), channel_id=1, replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
  %ag.done = (bf16[16,64]{1,0}, f32[8]{0}) all-gather-done(%ag)
  %rs = ((f32[16]{0}, f32[16]{0}), (f32[8]{0}, f32[8]{0})) reduce-scatter-start(%r, %r), channel_id=2, replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}, to_apply=%add
  %rs.done = (f32[8]{0}, f32[8]{0}) reduce-scatter-done(%rs)
  %ar = f32[16]{0} all-reduce-start(%r), channel_id=3, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %ar.done = f32[16]{0} all-reduce-done(%ar)
  %twice = (f32[16]{0}, f32[16]{0}) all-reduce-start(%ar.done), channel_id=4, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %twice.done = f32[16]{0} all-reduce-done(%twice)
  %cp = (f32[16]{0:T(128)}, f32[16]{0:T(128)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%twice.done), channel_id=5, source_target_pairs={{0,4},{4,0}}
  ROOT %cp.done = f32[16]{0:T(128)} collective-permute-done(%cp)
}
"""  # noqa: E501
    assert collectives(text, CUBE) == [
        Collective("all-gather", ("fsdp",), 2 * 16 * 64 + 4 * 8, 1, 0),
        Collective("reduce-scatter", ("fsdp",), 2 * 4 * 16, 1, 0),
        Collective("all-reduce", ("data",), 64, 1, 0),
        Collective("all-reduce", ("tensor",), 64, 1, 0),
        Collective("collective-permute", ("data",), 64, 1, 0),
    ]


def test_a_loop_that_a_gpu_unrolled_and_peeled_counts_as_written():
    """24 blocks: one before the loop, 11 times two in it, one after it."""
    reduction = "all-reduce(%p), replica_groups={{0,2},{1,3},{4,6},{5,7}}, to_apply=%add"
    text = f"""HloModule jit_step, num_partitions=8
%below (p: f32[4]) -> pred[] {{
  ROOT %lt = pred[] custom-call(%p), custom_call_target="lt"
}}
%body (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  %all-reduce.1 = f32[4]{{0}} {reduction}
  ROOT %all-reduce.1.double_buffer_clone = f32[4]{{0}} {reduction}
}}
ENTRY %main (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  %all-reduce.1.peeled_double_buffer = f32[4]{{0}} {reduction}
  %while = f32[4]{{0}} while(%p), condition=%below, body=%body, backend_config={{"known_trip_count":{{"n":"11"}},"known_init_step":{{"init":"1","step":"2"}}}}
  ROOT %last = f32[4]{{0}} {reduction}
}}
"""  # noqa: E501
    found = collectives(text, CUBE)
    assert sum(collective.count for collective in found) == 24
    assert {(collective.kind, collective.axes, collective.bytes) for collective in found} == {
        ("all-reduce", ("fsdp",), 16)
    }


def test_the_pieces_of_a_collective_among_a_tpus_fusions_are_one():
    def piece(name):
        return (
            f"%{name} (a: bf16[1,4], b: bf16[1,8]) -> bf16[1,8] {{\n"
            "  %a = bf16[1,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)\n"
            "  %b = bf16[1,8]{1,0:T(8,128)(2,1)S(1)} parameter(1)\n"
            f"  ROOT %of.{name} = bf16[1,8]{{1,0:T(8,128)(2,1)S(1)}} all-gather(%a), channel_id=82, "
            "replica_groups=mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_1'}, dimensions={1}, "
            'use_global_device_ids=true, frontend_attributes={chain_id="0"}\n}\n'
        )

    text = "HloModule jit_step, num_partitions=8\n" + piece("start") + piece("middle") + piece("done")
    text += """ENTRY %main (p: bf16[1,4], q: bf16[1,8]) -> bf16[1,8] {
  %p = bf16[1,4]{1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[1,8]{1,0:T(8,128)(2,1)} parameter(1)
  %async-collective-start = bf16[1,8]{1,0:T(8,128)(2,1)S(1)} fusion(%p, %q), kind=kCustom, calls=%start
  %fusion.1 = bf16[1,8]{1,0:T(8,128)(2,1)S(1)} fusion(%p, %async-collective-start), kind=kOutput, calls=%middle
  ROOT %async-collective-done = bf16[1,8]{1,0:T(8,128)(2,1)S(1)} fusion(%p, %fusion.1), kind=kCustom, calls=%done
}
"""
    assert collectives(text, CUBE) == [Collective("all-gather", ("fsdp",), 16, 1, 0)]


def test_a_tpus_reduce_scatter_is_an_all_reduce_fused_with_a_slice():
    text = """HloModule jit_step, num_partitions=8
%all-reduce-scatter.1 (input: bf16[16,4]) -> bf16[8,4] {
  %input = bf16[16,4]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = bf16[16,4]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=6, replica_groups={{0,2},{1,3},{4,6},{5,7}}, to_apply=%add
  %zero = u32[] constant(0)
  %dynamic-slice.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={8,4}
  ROOT %bitcast.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} bitcast(%dynamic-slice.1)
}
ENTRY %main (p: bf16[16,4], q: bf16[16,4]) -> (bf16[8,4], f32[16,4], f32[2]) {
  %p = bf16[16,4]{1,0:T(8,128)(2,1)} parameter(0)
  %q = f32[2]{0:T(128)} parameter(1)
  %fusion.1 = bf16[8,4]{1,0:T(8,128)(2,1)S(1)} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %all-reduce.2 = (f32[16,4]{1,0:T(8,128)}, f32[2]{0:T(128)S(1)}) all-reduce(%p, %q), channel_id=7, replica_groups=[4,2]<=[8], to_apply=%add
}
"""  # noqa: E501
    assert sorted(collectives(text, CUBE), key=lambda collective: collective.kind) == [
        Collective("all-reduce", ("tensor",), 4 * 64 + 8, 1, 0),  # it widens to float32 on the way
        Collective("reduce-scatter", ("fsdp",), 2 * 64, 1, 0),
    ]


def test_between_tpu_slices_arrays_are_sent_to_the_host_and_groups_are_numbered_within_a_slice():
    def transfer(kind, rendezvous, target):
        return (
            "is_host_transfer=true, frontend_attributes={"
            f'_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="{rendezvous}",'
            f'_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"}}'
        )

    to_sum = transfer("ALL_REDUCE", "reshard.1_0", '"{1,2}x{0:3}"')
    to_pass = transfer("ONE_TO_ONE", "collective-permute_0", "{{100000->200003},{200000->100003}}")
    lines = f"""  %p = f32[4]{{0:T(128)}} parameter(0)
  %token = token[] after-all()
  %all-reduce = f32[4]{{0:T(128)}} all-reduce(%p), channel_id=9, replica_groups={{{{0,2}},{{1,3}}}}, to_apply=%add
  %send = (f32[4]{{0:T(128)}}, u32[], token[]) send(%all-reduce, %token), channel_id=1, {to_sum}
  %recv = (f32[4]{{0:T(128)}}, u32[], token[]) recv(%token), channel_id=2, {to_sum}
  %send-done = token[] send-done(%send), channel_id=1, is_host_transfer=true
  %recv-done = (f32[4]{{0:T(128)}}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  %small = bf16[3]{{0:T(128)}} constant({{1, 2, 3}})
  %send.1 = (bf16[3]{{0:T(128)}}, u32[], token[]) send(%small, %token), channel_id=3, {to_pass}
  ROOT %recv.1 = (bf16[3]{{0:T(128)}}, u32[], token[]) recv(%token), channel_id=4, {to_pass}"""
    text = "HloModule jit_step, num_partitions=4\n" + MAIN.format(lines)
    assert collectives(text, {"dcn_data": 2, "fsdp": 2, "tensor": 2}) == [
        Collective("all-reduce", ("fsdp",), 16, 1, 0),
        Collective("all-reduce", ("dcn_data",), 16, 1, 0),
        Collective("collective-permute", ("dcn_data",), 6, 1, 0),
    ]


def test_a_ring_sends_every_shard_but_the_last_and_twice_for_an_all_reduce():
    per_device = {kind: bytes_sent(Collective(kind, ("fsdp",), 800, 1, 0), 8) for kind in KINDS}
    assert per_device == {
        "all-reduce": 1400,
        "all-gather": 700,
        "reduce-scatter": 700,
        "all-to-all": 700,
        "collective-permute": 800,
        "collective-broadcast": 800,
    }

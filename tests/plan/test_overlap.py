"""Which collectives have a matrix product to hide behind, in programs as each platform's compiler schedules them."""

import pytest

from vit_dist.plan.collectives import Collective
from vit_dist.plan.overlap import exposed

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
OVER_FSDP = "replica_groups={{0,2},{1,3},{4,6},{5,7}}"
PRODUCT = (
    "%product = (bf16[64,64]{1,0}, s8[4096]{0}) custom-call(%p, %p), "
    'custom_call_target="__cublas$lt$matmul", backend_config={}'
)
SUM = "%sum = bf16[64,64]{1,0} add(%p, %p)"
GATHERED, REDUCED = 2 * 128 * 64, 2 * 64 * 64


def module(*lines, before=""):
    """A program of these instructions, beside computations that they call."""
    body = "\n".join(f"  {line}" for line in (*lines[:-1], f"ROOT {lines[-1]}"))
    entry = f"ENTRY %main (p: bf16[64,64]) -> bf16[64,64] {{\n  %p = bf16[64,64]{{1,0}} parameter(0)\n{body}\n}}\n"
    return f"HloModule jit_step, num_partitions=8\n{before}{entry}"


def kinds(text):
    return [collective.kind for collective in exposed(text, CUBE)]


START = f"%start = (bf16[64,64], bf16[128,64]) all-gather-start(%p), channel_id=1, {OVER_FSDP}, dimensions={{0}}"
DONE = "%done = bf16[128,64]{1,0} all-gather-done(%start)"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ((START, PRODUCT, DONE), []),
        ((START, SUM, PRODUCT, DONE), []),
        ((PRODUCT, START, DONE), [Collective("all-gather", ("fsdp",), GATHERED, 1, 0)]),
        ((START, SUM, DONE, PRODUCT), [Collective("all-gather", ("fsdp",), GATHERED, 1, 0)]),
    ],
    ids=["a product between", "and a sum", "the product before", "a sum between, the product after"],
)
def test_a_pair_is_hidden_by_a_product_between_its_halves(lines, expected):
    assert exposed(module(*lines), CUBE) == expected


def test_a_synchronous_collective_is_exposed_whatever_is_beside_it():
    reduction = f"%all-reduce = bf16[64,64]{{1,0}} all-reduce(%p), channel_id=2, {OVER_FSDP}, to_apply=%add"
    assert kinds(module(PRODUCT, reduction, SUM)) == ["all-reduce"]


def test_a_loop_with_a_product_hides_what_runs_beside_it_and_counts_what_it_exposes_at_every_trip():
    loop = f"""%below (c: bf16[64,64]) -> pred[] {{
  ROOT %lt = pred[] custom-call(%c), custom_call_target="lt"
}}
%body (p: bf16[64,64]) -> bf16[64,64] {{
  %p = bf16[64,64]{{1,0}} parameter(0)
  %all-reduce = bf16[64,64]{{1,0}} all-reduce(%p), channel_id=3, {OVER_FSDP}, to_apply=%add
  ROOT %dot = bf16[64,64]{{1,0}} dot(%all-reduce, %p), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}
"""
    trips = 'backend_config={"known_trip_count":{"n":"12"}}'
    text = module(
        START, f"%while = bf16[64,64]{{1,0}} while(%p), condition=%below, body=%body, {trips}", DONE, before=loop
    )
    assert exposed(text, CUBE) == [Collective("all-reduce", ("fsdp",), REDUCED, 12, 1)]


@pytest.mark.parametrize(("between", "expected"), [(PRODUCT, []), (SUM, ["reduce-scatter"])])
def test_a_collective_in_an_asynchronous_computation_runs_until_its_done(between, expected):
    computation = f"""%async (a: bf16[64,64]) -> bf16[32,64] {{
  %a = bf16[64,64]{{1,0}} parameter(0)
  ROOT %scatter = bf16[32,64]{{1,0}} reduce-scatter(%a), channel_id=4, {OVER_FSDP}, dimensions={{0}}, to_apply=%add
}}
"""
    lines = (
        "%start = ((bf16[64,64]{1,0}), bf16[32,64]{1,0}, u32[]) async-start(%p), calls=%async",
        "%update = ((bf16[64,64]{1,0}), bf16[32,64]{1,0}, u32[]) async-update(%start)",
        between,
        "%done = bf16[32,64]{1,0} async-done(%update)",
        PRODUCT.replace("%product =", "%later ="),
    )
    assert kinds(module(*lines, before=computation)) == expected


def pieces(middle):
    """An all-gather in three fusions of a TPU's program; `middle` is beside its second piece."""

    def piece(name, beside=""):
        return (
            f"%{name} (a: bf16[64,64]) -> bf16[128,64] {{\n  %a = bf16[64,64]{{1,0}} parameter(0)\n{beside}"
            f"  ROOT %of.{name} = bf16[128,64]{{1,0}} all-gather(%a), channel_id=5, {OVER_FSDP}, dimensions={{0}}, "
            'frontend_attributes={chain_id="0"}\n}\n'
        )

    lines = (f"%fusion.{name} = bf16[128,64]{{1,0}} fusion(%p), calls=%{name}" for name in ("first", "second", "third"))
    return module(*lines, before=piece("first") + piece("second", middle) + piece("third"))


def test_the_pieces_of_a_collective_are_hidden_by_a_product_fused_with_one():
    product = "  %product = bf16[64,64]{1,0} convolution(%a, %a), dim_labels=bf_io->bf\n"
    assert kinds(pieces(product)) == []
    assert kinds(pieces("  %square = bf16[64,64]{1,0} multiply(%a, %a)\n")) == ["all-gather"]


def test_a_collective_in_a_fusion_without_a_product_is_synchronous():
    scatter = f"""%all-reduce-scatter (a: bf16[64,64]) -> bf16[32,64] {{
  %a = bf16[64,64]{{1,0}} parameter(0)
  %all-reduce = bf16[64,64]{{1,0}} all-reduce(%a), channel_id=6, {OVER_FSDP}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice = bf16[32,64]{{1,0}} dynamic-slice(%all-reduce, %zero, %zero), dynamic_slice_sizes={{32,64}}
}}
"""
    fusion = "%fusion = bf16[32,64]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter"
    assert kinds(module(PRODUCT, fusion, before=scatter)) == ["reduce-scatter"]


@pytest.mark.parametrize(("between", "expected"), [(PRODUCT, []), (SUM, ["all-reduce"])])
def test_a_transfer_between_slices_lasts_until_its_answer_is_received(between, expected):
    def attributes(rendezvous):
        return (
            f'frontend_attributes={{_xla_host_transfer_rendezvous="{rendezvous}",'
            '_xla_megascale_transfer_type="ALL_REDUCE"}'
        )

    lines = (
        "%token = token[] after-all()",
        f"%send = (bf16[64,64]{{1,0}}, u32[], token[]) send(%p, %token), channel_id=1, {attributes('sum')}",
        f"%recv.1 = (bf16[64,64]{{1,0}}, u32[], token[]) recv(%token), channel_id=3, {attributes('another')}",
        f"%recv = (bf16[64,64]{{1,0}}, u32[], token[]) recv(%token), channel_id=2, {attributes('sum')}",
        "%send-done = token[] send-done(%send), channel_id=1",
        "%recv-done.1 = (bf16[64,64]{1,0}, token[]) recv-done(%recv.1), channel_id=3",
        between,
        "%recv-done = (bf16[64,64]{1,0}, token[]) recv-done(%recv), channel_id=2",
        PRODUCT.replace("%product =", "%later ="),
    )
    found = exposed(module(*lines), {"dcn_data": 2, **CUBE})
    assert [collective.kind for collective in found] == expected

"""Bytes to and from memory: programs whose traffic is known by hand, and what a TPU's compiler keeps on the chip."""

import jax
import jax.numpy as jnp
import pytest

from vit_dist.plan.traffic import Traffic, traffic


def of(function, *shapes):
    """The traffic of a function of float32 arrays of these shapes, compiled for one CPU device."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return traffic(jax.jit(function).lower(*arrays).compile().as_text())


def test_a_sum_reads_both_operands_and_writes_its_result():
    assert of(jnp.add, (1000,), (1000,)) == Traffic(product_bytes=0, other_bytes=3 * 4000, kernels=1)


def test_intermediate_arrays_of_a_fusion_move_nothing():
    found = of(lambda x, y: jnp.exp(x * y) + x, (1000,), (1000,))
    assert found == Traffic(product_bytes=0, other_bytes=3 * 4000, kernels=1)


def test_a_product_counts_apart_from_what_follows_it():
    found = of(lambda x, y: jnp.sin(x @ y), (64, 128), (128, 32))
    assert found.product_bytes == 4 * (64 * 128 + 128 * 32 + 64 * 32)
    assert found.other_bytes == 4 * 2 * 64 * 32


def test_a_loop_that_reads_a_stack_reads_one_slice_at_a_time():
    length, width = 50, 10_000
    found = of(lambda x, stack: jax.lax.scan(lambda x, row: (x + row, None), x, stack)[0], (width,), (length, width))
    # Each turn reads what it carries and a row, and writes what it carries. Beside it a counter, and copies outside.
    assert found.other_bytes == pytest.approx(length * 3 * 4 * width, rel=0.05)
    assert found.product_bytes == 0


def test_a_loop_that_fills_a_stack_writes_one_slice_at_a_time():
    length, width = 50, 10_000
    found = of(lambda x: jax.lax.scan(lambda x, _: (x + 1, x), x, length=length)[1], (width,))
    row = 4 * width
    # The stack is zeros first. Each turn copies what it carries, so as to write over it, reads and writes it to add 1,
    # and puts the copy into the stack.
    assert found.other_bytes == pytest.approx(length * row + length * 3 * 2 * row, rel=0.05)


def test_products_in_a_loop_count_as_often_as_it_runs():
    found = of(lambda x, w: jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0], (8, 64), (10, 64, 64))
    assert found.product_bytes == 10 * 4 * (8 * 64 + 64 * 64 + 8 * 64)


def test_kernels_in_a_loop_count_at_every_trip_and_collectives_and_calls_are_none():
    text = """HloModule jit_step, num_partitions=8
%below (c: f32[4]) -> pred[] {
  %c = f32[4]{0} parameter(0)
  ROOT %lt = pred[] custom-call(%c), custom_call_target="lt"
}
%body (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %all-reduce = f32[4]{0} all-reduce(%p), replica_groups={}, to_apply=%add
  ROOT %negate = f32[4]{0} negate(%all-reduce)
}
ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %first = f32[4]{0} sine(%p)
  ROOT %while = f32[4]{0} while(%first), condition=%below, body=%body, backend_config={"known_trip_count":{"n":"12"}}
}
"""
    assert traffic(text).kernels == 1 + 12 * (1 + 1)  # the loop's own comparison is one


def test_what_lies_on_a_tpus_chip_does_not_count_and_tiles_are_whole():
    text = """HloModule jit_step, num_partitions=1
ENTRY %main (p: f32[197,256], q: bf16[16,128]) -> f32[197,256] {
  %p = f32[197,256]{1,0:T(8,128)} parameter(0)
  %q = bf16[16,128]{1,0:T(8,128)(2,1)} parameter(1)
  %copy-start = (bf16[16,128]{1,0:T(8,128)(2,1)S(1)}, bf16[16,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) copy-start(%q)
  %copy-done = bf16[16,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %wide = f32[16,128]{1,0:T(8,128)S(1)} convert(%copy-done)
  %buffer = f32[24,197,256]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %square = f32[197,256]{1,0:T(8,128)S(1)} multiply(%p, %p)
  %all-reduce = f32[197,256]{1,0:T(8,128)S(1)} all-reduce(%square), replica_groups={}, to_apply=%add
  ROOT %negate = f32[197,256]{1,0:T(8,128)} negate(%all-reduce)
}
"""
    prefetched = 2 * 16 * 128
    padded = 4 * 200 * 256  # 197 rows take 25 tiles of 8
    assert traffic(text) == Traffic(product_bytes=0, other_bytes=prefetched + 2 * padded, kernels=4)


def test_a_fusion_reads_the_slice_it_takes_and_writes_the_slice_it_puts():
    text = """HloModule jit_step, num_partitions=1
%within (x: f32[24,8,128]) -> f32[8,128] {
  %x = f32[24,8,128]{2,1,0} parameter(0)
  %i = s32[] constant(3)
  %row = f32[1,8,128]{2,1,0} dynamic-slice(%x, %i, %i, %i), dynamic_slice_sizes={1,8,128}
  ROOT %flat = f32[8,128]{1,0} bitcast(%row)
}
%fused (stack: f32[24,8,128], other: f32[24,8,128], kept: f32[7]) -> (f32[24,8,128], f32[8,128], f32[7]) {
  %stack = f32[24,8,128]{2,1,0} parameter(0)
  %other = f32[24,8,128]{2,1,0} parameter(1)
  %kept = f32[7]{0} parameter(2)
  %j = s32[] constant(4)
  %taken = f32[8,128]{1,0} fusion(%other), kind=kLoop, calls=%within
  %put = f32[1,8,128]{2,1,0} bitcast(%taken)
  %stacked = f32[24,8,128]{2,1,0} dynamic-update-slice(%stack, %put, %j, %j, %j)
  ROOT %all = (f32[24,8,128]{2,1,0}, f32[8,128]{1,0}, f32[7]{0}) tuple(%stacked, %taken, %kept)
}
ENTRY %main (p: f32[24,8,128], q: f32[24,8,128], r: f32[7]) -> (f32[24,8,128], f32[8,128], f32[7]) {
  %p = f32[24,8,128]{2,1,0} parameter(0)
  %q = f32[24,8,128]{2,1,0} parameter(1)
  %r = f32[7]{0} parameter(2)
  ROOT %two = (f32[24,8,128]{2,1,0}, f32[8,128]{1,0}, f32[7]{0}) fusion(%p, %q, %r), kind=kLoop, calls=%fused
}
"""
    assert traffic(text) == Traffic(
        product_bytes=0, other_bytes=3 * 4 * 8 * 128, kernels=1
    )  # one slice read, written twice


def test_a_product_fused_with_a_piece_of_a_collective_counts_its_own_arrays_alone():
    text = """HloModule jit_step, num_partitions=1
%fused (a: bf16[1,4096], b: bf16[1,65536], x: bf16[64,32], w: bf16[32,16]) -> (bf16[64,16], bf16[1,65536]) {
  %a = bf16[1,4096]{1,0} parameter(0)
  %b = bf16[1,65536]{1,0} parameter(1)
  %x = bf16[64,32]{1,0} parameter(2)
  %w = bf16[32,16]{1,0} parameter(3)
  %piece = bf16[1,65536]{1,0} all-gather(%a), channel_id=1, replica_groups={}, dimensions={1}
  %product = bf16[64,16]{1,0} convolution(%x, %w), dim_labels=bf_io->bf
  ROOT %both = (bf16[64,16]{1,0}, bf16[1,65536]{1,0}) tuple(%product, %piece)
}
ENTRY %main (a: bf16[1,4096], b: bf16[1,65536], x: bf16[64,32], w: bf16[32,16]) -> (bf16[64,16], bf16[1,65536]) {
  %a = bf16[1,4096]{1,0} parameter(0)
  %b = bf16[1,65536]{1,0} parameter(1)
  %x = bf16[64,32]{1,0} parameter(2)
  %w = bf16[32,16]{1,0} parameter(3)
  ROOT %fusion = (bf16[64,16]{1,0}, bf16[1,65536]{1,0}) fusion(%a, %b, %x, %w), kind=kOutput, calls=%fused
}
"""
    assert traffic(text) == Traffic(product_bytes=2 * (64 * 32 + 32 * 16 + 64 * 16), other_bytes=0, kernels=1)

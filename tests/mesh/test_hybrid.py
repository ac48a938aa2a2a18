"""Slices or nodes connected by a network: the collectives of every block stay within one of them."""

import pytest
from compiled import program_on, step_collectives
from system import NO_AUGMENTATION, NO_DROPOUT

# Two slices of 2x2 devices. Fake devices 0 to 3 are the first slice, 4 to 7 the second.
HYBRIDS = {
    "fsdp x tensor": {"dcn_data": 2, "fsdp": 2, "tensor": 2},
    "fsdp x context": {"dcn_data": 2, "fsdp": 2, "context": 2},
    "data x tensor": {"dcn_data": 2, "data": 2, "tensor": 2},
    "context x tensor": {"dcn_data": 2, "context": 2, "tensor": 2},
}


@pytest.mark.parametrize("hybrid", HYBRIDS)
def test_the_collectives_of_every_block_stay_within_a_slice(hybrid):
    program = program_on(HYBRIDS[hybrid], *NO_DROPOUT, *NO_AUGMENTATION, "log_examples=false")
    collectives = step_collectives(program)
    inside = [op for op in collectives if "dcn_data" not in op.axes]
    across = [op for op in collectives if "dcn_data" in op.axes]
    # Within a slice: collectives over fsdp, context and tensor, in the loop over blocks too. (The sum over `data` is
    # part of the one over `dcn_data`, once a step.)
    for axis in set(hybrid.split(" x ")) - {"data"}:
        assert any(axis in op.axes and op.loops for op in inside), axis
    # Across slices: only sums of gradients and metrics, once a step, and over no axis that splits parameters or tokens.
    assert {(op.kind, op.loops) for op in across} == {("all-reduce", 0)}
    for op in across:
        assert not {"tensor", "context"} & set(op.axes), op
        if "fsdp" in op.axes:  # scalars, such as the loss, and gradients of parameters that are not split
            assert op.bytes < 2000, op

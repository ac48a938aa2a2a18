"""Slices or nodes joined by a network: what talks in every block stays within one, by the compiled step's groups."""

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
def test_what_talks_in_every_block_stays_within_a_slice(hybrid):
    program = program_on(HYBRIDS[hybrid], *NO_DROPOUT, *NO_AUGMENTATION, "log_examples=false")
    found = step_collectives(program)
    inside = [one for one in found if "dcn_data" not in one.axes]
    across = [one for one in found if "dcn_data" in one.axes]
    # Within: fsdp, context and tensor are spoken over, in the loop over blocks too. (The sum over `data` is one with
    # that over `dcn_data`, once a step.)
    for axis in set(hybrid.split(" x ")) - {"data"}:
        assert any(axis in one.axes and one.loops for one in inside), axis
    # Across: sums of gradients and metrics alone, once a step, over nothing that splits a parameter or an image.
    assert {(one.kind, one.loops) for one in across} == {("all-reduce", 0)}
    for one in across:
        assert not {"tensor", "context"} & set(one.axes), one
        if "fsdp" in one.axes:  # scalars, such as the loss, and gradients of what is whole on every device
            assert one.bytes < 2000, one

"""The largest batch that fits is found in few compilations."""

import pytest

from vit_dist.plan.largest import TRIES, largest_multiple


def search(peak, limit):
    """The answer, and the multiples that were compiled for it."""
    asked = []

    def peak_bytes(n):
        asked.append(n)
        return peak(n)

    found = largest_multiple(peak_bytes, limit)
    assert len(asked) == len(set(asked)), "nothing is compiled twice"
    return found, asked


@pytest.mark.parametrize("largest", [1, 2, 3, 7, 100, 4321])
def test_on_a_straight_line_it_is_found_in_a_few_tries(largest):
    found, asked = search(lambda n: 1000 + 70 * n, 1000 + 70 * largest + 69)
    assert found == largest
    assert len(asked) <= 7


@pytest.mark.parametrize("largest", [5, 60, 700])
def test_a_jump_in_memory_does_not_mislead_the_search(largest):
    # A tenth more from some size on, as when the compiler changes its mind about what to keep.
    peak = lambda n: (1000 + 70 * n) * (11 if n > largest else 10)  # noqa: E731
    found, asked = search(peak, 10 * (1000 + 70 * largest))
    assert found == largest
    assert len(asked) <= TRIES


def test_nothing_fits():
    assert search(lambda n: 100 + n, 100) == (0, [1])


def test_the_result_after_too_many_tries_fits():
    peak = lambda n: n if n < 1000 else 10**9  # noqa: E731 - flat, then a wall
    found, asked = search(peak, 10**6)
    assert len(asked) == TRIES
    assert 1 <= found < 1000


def test_memory_that_does_not_grow_at_first_does_not_end_the_search():
    found, _ = search(lambda n: max(500, 10 * n), 1000)
    assert found == 100

"""The order of examples: a shuffle that is computed, not stored."""

import itertools
import math
import time
from collections import Counter

import numpy as np
import pytest

from vit_dist.data.order import example_ids, permutation


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 1000, 1437, 65537])
def test_every_id_comes_exactly_once_in_every_epoch(size: int) -> None:
    for epoch in (0, 1, 1000):
        assert np.array_equal(np.sort(permutation(3, epoch, size, np.arange(size))), np.arange(size))


def test_every_id_comes_once_an_epoch_where_batches_straddle_epochs() -> None:
    size, batch_size = 10, 4
    stream = np.concatenate([example_ids(0, size, step * batch_size + np.arange(batch_size)) for step in range(15)])
    assert stream.shape == (60,)
    for epoch in range(6):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_an_id_depends_on_its_position_alone() -> None:
    positions = np.arange(5000)
    whole = example_ids(7, 1437, positions)
    backwards = positions[::-1]
    assert np.array_equal(example_ids(7, 1437, backwards), whole[::-1])
    assert np.array_equal(np.concatenate([example_ids(7, 1437, part) for part in np.split(positions, 8)]), whole)


def test_epochs_and_seeds_have_unrelated_orders() -> None:
    size = 10_000
    orders = [permutation(seed, epoch, size, np.arange(size)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 10  # one match is expected by chance
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


def test_the_order_is_that_of_the_first_release() -> None:
    """A run must be resumable by a later version, so these may not change."""
    assert permutation(0, 0, 10, np.arange(10)).tolist() == [3, 8, 4, 0, 5, 7, 9, 6, 2, 1]
    assert permutation(42, 7, 1_281_167, np.arange(4)).tolist() == [1031049, 794048, 216662, 801200]


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_shuffles_of_a_few_are_equally_likely(size: int) -> None:
    shuffles = math.factorial(size)
    counts = Counter(tuple(permutation(0, epoch, size, np.arange(size))) for epoch in range(50 * shuffles))
    chi_square = sum((count - 50) ** 2 / 50 for count in counts.values()) + 50 * (shuffles - len(counts))
    assert chi_square < shuffles - 1 + 5 * math.sqrt(2 * shuffles)


def test_every_id_is_equally_likely_at_every_place_and_after_every_other() -> None:
    size, epochs = 23, 2000
    orders = np.stack([permutation(5, epoch, size, np.arange(size)) for epoch in range(epochs)])
    places = np.stack([np.bincount(orders[:, place], minlength=size) for place in range(size)])
    expected = epochs / size
    freedom = (size - 1) ** 2
    assert ((places - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)
    following = np.bincount((orders[:, :-1] * size + orders[:, 1:]).ravel(), minlength=size * size)
    off_diagonal = following.reshape(size, size)[~np.eye(size, dtype=bool)]
    expected = epochs / size
    freedom = size * (size - 1)
    assert ((off_diagonal - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


def test_neighbours_are_spread_over_the_whole_set() -> None:
    """A set sorted by class must be mixed in every batch."""
    size = 50_000
    classes = example_ids(0, size, np.arange(size)) // 5000
    counts = np.stack([np.bincount(batch, minlength=10) for batch in classes.reshape(-1, 500)])
    assert 15 < counts.min() and counts.max() < 90  # 50 expected, deviation 6.7
    assert 5.5 < counts.std() < 7.5


def test_a_position_outside_the_epoch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\[0, 5\), found 3 to 5"):
        permutation(0, 0, 5, np.array([3, 5]))


def test_millions_of_ids_a_second() -> None:
    positions = np.arange(400_000)
    seconds = []
    for _ in range(4):
        start = time.thread_time()
        example_ids(0, 1_281_167, positions)
        seconds.append(time.thread_time() - start)
    assert len(positions) / min(seconds) > 3e6  # 10e6 measured on one 2-core machine

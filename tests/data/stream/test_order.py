"""The order of examples: a shuffle that is computed, not stored."""

import hashlib
import itertools
import math
import pickle
import time
from collections import Counter

import numpy as np
import pytest

from vit_dist.data.shuffle import example_ids
from vit_dist.data.stream.order import BLOCK, Order, block_slots

MIXED = Order(3, (1000, 37, 200_000), (6.0, 1.0, 3.0))


def _epoch_ids(seed: int, epoch: int, size: int) -> np.ndarray:
    return example_ids(seed, size, epoch * size + np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 1000, 1437, 65537])
def test_every_id_comes_exactly_once_in_every_epoch(size: int) -> None:
    for epoch in (0, 1, 1000):
        assert np.array_equal(np.sort(_epoch_ids(3, epoch, size)), np.arange(size))


def test_every_id_comes_once_an_epoch_where_batches_straddle_epochs() -> None:
    size, batch_size = 10, 4
    stream = np.concatenate([example_ids(0, size, step * batch_size + np.arange(batch_size)) for step in range(15)])
    assert stream.shape == (60,)
    for epoch in range(6):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == list(range(size))


@pytest.mark.parametrize("repeats", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(1,), (13,), (1437,), (4, 1, 8), (4097, 4095, 1)])
def test_every_id_comes_exactly_once_in_every_epoch_of_several_sources(sizes: tuple[int, ...], repeats: int) -> None:
    size, order = sum(sizes), Order(1, sizes, repeats=repeats)
    for epoch in (0, 1, 2, 10**6):
        ids = order.ids((epoch * size * repeats) + np.arange(size * repeats)).reshape(size, repeats)
        assert np.array_equal(ids, np.broadcast_to(ids[:, :1], ids.shape))
        assert np.array_equal(np.sort(ids[:, 0]), np.arange(size))


@pytest.mark.parametrize("weights", [None, (6.0, 1.0, 3.0)])
def test_an_example_is_repeated_at_as_many_positions_in_a_row(weights: tuple[float, ...] | None) -> None:
    once, thrice = (Order(3, (1000, 37, 200_000), weights, repeats) for repeats in (1, 3))
    assert np.array_equal(thrice.ids(np.arange(50, 9000)), once.ids(np.arange(50, 9000) // 3))


@pytest.mark.parametrize("order", [Order(7, (1437,)), Order(7, (60_000, 5), repeats=3), MIXED])
def test_an_id_depends_on_its_position_alone(order: Order) -> None:
    positions = 10_000 + np.arange(20_000)
    expected = order.ids(positions)
    chosen = np.random.default_rng(0).integers(0, 20_000, 3000)  # in any order, some twice
    assert np.array_equal(order.ids(positions[chosen]), expected[chosen])
    for index in chosen[:50]:
        assert order.ids(positions[index : index + 1]) == expected[index]
    for size in (1, 7, 128, 5000):
        batches = [order.ids(positions[start : start + size]) for start in range(0, 7000, size)]
        assert np.array_equal(np.concatenate(batches)[:7000], expected[:7000])
    copy = pickle.loads(pickle.dumps(order))
    assert copy == order and np.array_equal(copy.ids(positions), expected)
    assert order.ids(np.arange(0)).shape == (0,)


@pytest.mark.parametrize("order", [Order(7, (1437,)), Order(7, (60_000,), repeats=3), MIXED])
@pytest.mark.parametrize("hosts", [2, 4])
def test_the_rows_of_all_hosts_are_the_global_batch(order: Order, hosts: int) -> None:
    batch_size, steps = 48, 400  # more than a chunk, several epochs or a block
    rows = batch_size // hosts
    for step in range(0, steps, 7):
        of_hosts = [order.ids(step * batch_size + host * rows + np.arange(rows)) for host in range(hosts)]
        assert np.array_equal(np.concatenate(of_hosts), order.ids(step * batch_size + np.arange(batch_size)))


def test_the_returned_ids_may_be_written_to() -> None:
    order = Order(0, (100,))
    first = order.ids(np.arange(32))
    kept = first.copy()
    first[:] = -1
    assert np.array_equal(order.ids(np.arange(32)), kept)


def test_weights_become_whole_slots_of_a_block() -> None:
    assert block_slots((1.0, 1.0)) == (8192, 8192)
    assert block_slots((0.2, 0.1)) == block_slots((2.0, 1.0)) == (10923, 5461)
    assert block_slots((1.0, 1.0, 1.0)) == (5462, 5461, 5461)
    assert block_slots((1e-9, 1.0, 1e-9)) == (1, 16382, 1)
    assert block_slots((1.0,) * BLOCK) == (1,) * BLOCK
    assert block_slots((5e-324, 1e300)) == (1, 16383)
    for weights in ((1.0, 0.0), (1.0, -1.0), (math.inf, 1.0), (1.0,) * (BLOCK + 1)):
        with pytest.raises(ValueError, match="numbers above 0"):
            block_slots(weights)


def test_every_block_of_a_mixture_holds_each_source_by_its_weight() -> None:
    slots = block_slots((6.0, 1.0, 3.0))
    assert slots == (9831, 1638, 4915)  # 9830.4, 1638.4, 4915.2
    for block in (*range(20), 10**9):
        ids = MIXED.ids(block * BLOCK + np.arange(BLOCK))
        source = np.searchsorted((1000, 1037, 201_037), ids, side="right")
        assert tuple(np.bincount(source)) == slots


def test_each_source_of_a_mixture_yields_all_its_examples_before_it_repeats_any() -> None:
    blocks = 50
    ids = MIXED.ids(np.arange(blocks * BLOCK))
    for (start, size), slots in zip(((0, 1000), (1000, 37), (1037, 200_000)), block_slots((6.0, 1.0, 3.0))):
        for first in (1, 3, 17, blocks):
            seen = ids[: first * BLOCK]
            counts = np.bincount(seen[(seen >= start) & (seen < start + size)] - start, minlength=size)
            assert len(counts) == size
            assert counts.min() == first * slots // size and counts.max() == -(-first * slots // size)


def test_the_sources_of_a_mixture_are_mixed_in_every_batch() -> None:
    size, batch_size = 10_000, 512
    order = Order(0, (size, size), (3.0, 1.0))
    ids = order.ids(np.arange(60 * BLOCK))
    seconds = (ids >= size).reshape(-1, batch_size).sum(1)
    share = 0.25
    assert seconds.mean() == batch_size * share
    left_over = (BLOCK - batch_size) / (BLOCK - 1)  # drawn from a block without return
    assert seconds.std() == pytest.approx(math.sqrt(batch_size * share * (1 - share) * left_over), rel=0.1)
    by_slot = (ids >= size).reshape(60, BLOCK).sum(0)  # 15 of 60 expected in each slot of a block
    assert by_slot.std() == pytest.approx(math.sqrt(60 * share * (1 - share)), rel=0.1)


def test_sources_blocks_and_epochs_have_unrelated_orders() -> None:
    size = BLOCK
    order = Order(0, (size, size), (1.0, 1.0))
    ids = order.ids(np.arange(4 * BLOCK))
    first, second = ids[ids < size][:size], ids[ids >= size][:size] - size
    plain = example_ids(0, size, np.arange(size))
    again = ids[ids < size][size:]
    for a, b in itertools.combinations((first, second, plain, again), 2):
        assert (a == b).sum() < 10
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
    kinds = (ids >= size).reshape(4, BLOCK)
    assert np.abs(np.corrcoef(kinds) - np.eye(4)).max() < 0.05


def test_a_mixture_of_one_source_is_shuffled_as_that_source_whatever_its_weight() -> None:
    assert np.array_equal(Order(5, (1000,), (0.3,)).ids(np.arange(5000)), example_ids(5, 1000, np.arange(5000)))


def test_epochs_and_seeds_have_unrelated_orders() -> None:
    size = 10_000
    orders = [_epoch_ids(seed, epoch, size) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 10  # one match is expected by chance
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.05


def test_the_order_is_that_of_the_first_release() -> None:
    """A run must be resumable by a later version, so these may not change."""
    assert _epoch_ids(0, 0, 10).tolist() == [3, 8, 4, 0, 5, 7, 9, 6, 2, 1]
    assert _epoch_ids(42, 7, 1_281_167)[:4].tolist() == [1031049, 794048, 216662, 801200]
    for seed, size, positions, wanted in (
        (0, 1437, [0, 1, 1436, 1437, 2874, 10**9], [621, 1423, 1159, 942, 1104, 708]),
        (42, 1_281_167, [0, 1_281_166, 1_281_167, 10**12], [239906, 222758, 1090063, 268261]),
        (7, 5, list(range(10)), [4, 2, 1, 0, 3, 2, 0, 3, 4, 1]),
        (3, 1, [0, 1, 2], [0, 0, 0]),
        (2**32 - 1, 60_000, [59_999, 60_000, 123_456_789], [16015, 30780, 14268]),
    ):
        assert example_ids(seed, size, np.array(positions)).tolist() == wanted
        assert Order(seed, (size,)).ids(np.array(positions)).tolist() == wanted
        assert (
            np.concatenate([Order(seed, (size,)).ids(np.array([position])) for position in positions]).tolist()
            == wanted
        )
    for ids in (example_ids(0, 50_000, np.arange(200_000)), Order(0, (1, 49_999)).ids(np.arange(200_000))):
        assert hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=8).hexdigest() == "816cb93f76e00224"


def test_the_order_of_a_mixture_is_that_of_the_first_release() -> None:
    assert MIXED.ids(np.arange(8)).tolist() == [108658, 99930, 114915, 597, 137634, 118882, 75669, 103666]
    ids = MIXED.ids(np.arange(3 * BLOCK))
    assert hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=8).hexdigest() == "e93c3270f49107a1"


@pytest.mark.parametrize("size", [3, 4, 5])
def test_all_shuffles_of_a_few_are_equally_likely(size: int) -> None:
    shuffles = math.factorial(size)
    counts = Counter(tuple(_epoch_ids(0, epoch, size)) for epoch in range(50 * shuffles))
    chi_square = sum((count - 50) ** 2 / 50 for count in counts.values()) + 50 * (shuffles - len(counts))
    assert chi_square < shuffles - 1 + 5 * math.sqrt(2 * shuffles)


def test_every_id_is_equally_likely_at_every_position_and_after_every_other() -> None:
    size, epochs = 23, 2000
    orders = np.stack([_epoch_ids(5, epoch, size) for epoch in range(epochs)])
    by_position = np.stack([np.bincount(orders[:, position], minlength=size) for position in range(size)])
    expected = epochs / size
    freedom = (size - 1) ** 2
    assert ((by_position - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)
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


def test_millions_of_ids_a_second() -> None:
    positions = np.arange(400_000)
    seconds = []
    for _ in range(4):
        start = time.thread_time()
        example_ids(0, 1_281_167, positions)
        seconds.append(time.thread_time() - start)
    assert len(positions) / min(seconds) > 3e6  # 14e6 measured on one 2-core machine


def test_small_batches_cost_little_more_for_each_id() -> None:
    order, seconds = Order(0, (1_281_167,)), []
    for attempt in range(4):
        start = time.thread_time()
        for step in range(attempt * 1000, (attempt + 1) * 1000):
            order.ids(step * 128 + np.arange(128))
        seconds.append(time.thread_time() - start)
    assert 128_000 / min(seconds) > 2e6  # 9e6 measured on one 2-core machine

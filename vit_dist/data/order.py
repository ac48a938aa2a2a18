"""Which example stands where in the stream that training sees.

The stream is endless, and its order is *computed*, not stored: what stands at global position `p = step * batch_size +
row` is a function of the seed and `p` alone. So any host can work out any part of any epoch alone, a resume needs
nothing but the step, on however many hosts, and no list of a billion ids is kept or sent anywhere.
"""

import dataclasses
import functools
import itertools
import math
from fractions import Fraction

import numpy as np

BLOCK = 1 << 14  # slots of a mixture's stream that are shared out together, and so the finest share: 1/16384
_ROUNDS = 12  # with 8, the shuffles of five or six examples are visibly not all as likely
_CHUNK = 1 << 14  # positions worked on at a time: what stays in a core's cache
_STRETCH = 1 << 12  # positions whose ids are worked out together and kept: a batch may ask for a few only
_SLOTS, _PART = 0, 1  # what a key shuffles beside a whole set: the slots of a mixture's block, one of its parts
_HALF = np.uint64(32)
_MIX = np.uint64(0xD6E8FEB86659FD93)  # an odd constant that spreads a difference in any bit over the upper half


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of one set, or of several: `sizes` are their examples, and ids count on from one to the next.

    Without `weights` every id comes exactly once an epoch, and epoch `k` is positions `[k * size, (k + 1) * size)`.
    With them, one for each size, every `BLOCK` positions hold of each set its share, to the nearest whole slot and at
    least one; and each set by itself passes all its examples before it begins anew (but for the shuffle in a block).

    `repeats` is how often an example follows itself, to be augmented differently each time; an epoch is that much
    longer (Hoffer et al. 2019, arXiv:1901.09335; Berman et al. 2019, arXiv:1902.05509).
    """

    seed: int
    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    repeats: int = 1

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """The ids `int64 [n]` of the examples at global `positions` `int64 [n]`."""
        places = np.asarray(positions, np.int64) // self.repeats
        if not len(places):
            return places
        first, last = int(places.min()) // _STRETCH, int(places.max()) // _STRETCH
        if last - first > 1:
            return self._ids(places)
        kept = [_stretch(self, number) for number in range(first, last + 1)]
        return (kept[0] if first == last else np.concatenate(kept))[places - first * _STRETCH]

    def _ids(self, places: np.ndarray) -> np.ndarray:
        if self.weights is None or len(self.sizes) == 1:
            return example_ids(self.seed, sum(self.sizes), places)
        slots = block_slots(self.weights)
        ends = tuple(itertools.accumulate(slots))
        blocks, slot = np.divmod(places, BLOCK)
        slot = _shuffled(self.seed, (_SLOTS,), blocks, BLOCK, slot)
        part = np.searchsorted(ends, slot, side="right")
        ids, first_id = np.empty_like(places), 0
        for number, size in enumerate(self.sizes):
            here = np.flatnonzero(part == number)
            index = blocks[here] * slots[number] + slot[here] - (ends[number] - slots[number])
            epochs, ranks = np.divmod(index, size)  # of this part's own stream
            ids[here] = first_id + _shuffled(self.seed, (_PART, number), epochs, size, ranks)
            first_id += size
        return ids


@functools.lru_cache(maxsize=32)
def _stretch(order: Order, number: int) -> np.ndarray:
    """The ids of a stretch of the stream: a few rows at a time would cost as much each."""
    return order._ids(np.arange(number * _STRETCH, (number + 1) * _STRETCH))


@functools.lru_cache(maxsize=32)
def block_slots(weights: tuple[float, ...]) -> tuple[int, ...]:
    """How many of `BLOCK` slots each weight gets: by largest remainder, at least one. Raises `ValueError`."""
    if len(weights) > BLOCK or not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights: expected at most {BLOCK} numbers above 0, found {weights}")
    exact = [Fraction(str(weight)) for weight in weights]  # so that 3 and 1 share as 0.3 and 0.1 do
    total = sum(exact)
    shares = [weight * BLOCK / total for weight in exact]
    slots = [max(1, math.floor(share)) for share in shares]
    while sum(slots) < BLOCK:
        slots[max(range(len(slots)), key=lambda k: shares[k] - slots[k])] += 1
    while sum(slots) > BLOCK:
        slots[max((k for k in range(len(slots)) if slots[k] > 1), key=lambda k: slots[k] - shares[k])] -= 1
    return tuple(slots)


def example_ids(seed: int, size: int, positions: np.ndarray) -> np.ndarray:
    """The ids `int64 [n]` of the examples of one set at `positions` `int64 [n]` of its stream.

    Over positions `[k * size, (k + 1) * size)` every id of `[0, size)` comes exactly once, for every epoch `k`.
    """
    epochs, ranks = np.divmod(np.asarray(positions, np.int64), size)
    return _shuffled(seed, (), epochs, size, ranks)


def permutation(seed: int, epoch: int, size: int, positions: np.ndarray) -> np.ndarray:
    """A shuffle of `[0, size)`, evaluated at `positions` `int64 [n]` -> ids `int64 [n]`; `size` is at most 2**62."""
    positions = np.asarray(positions, np.int64)
    if positions.size and (positions.min() < 0 or positions.max() >= size):
        raise ValueError(f"positions must lie in [0, {size}), found {positions.min()} to {positions.max()}")
    return _shuffled(seed, (), np.full_like(positions, epoch), size, positions)


def _shuffled(seed: int, what: tuple[int, ...], epochs: np.ndarray, size: int, ranks: np.ndarray) -> np.ndarray:
    """The ids at `ranks` of the shuffles of `[0, size)` that belong to `epochs`, both `int64 [n]`.

    A Feistel network over a grid of `rows x columns >= size` cells, its halves mixed by modular addition (the
    generalised Feistel of Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Where a value falls
    outside `[0, size)` the network is applied again until it is inside ("cycle walking"); the grid is so close to
    `size` that few are. The round keys come from the seed, what is shuffled, and the epoch.
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    ids = np.empty(ranks.shape, np.int64)
    for start in range(0, len(ranks), _CHUNK):
        here = slice(start, start + _CHUNK)
        keys = _keys(seed, what, epochs[here])
        values = _network(ranks[here].astype(np.uint64), rows, columns, keys)
        outside = np.flatnonzero(values >= size)
        while len(outside):
            values[outside] = _network(values[outside], rows, columns, keys if keys.ndim == 1 else keys[:, outside])
            outside = outside[values[outside] >= size]
        ids[here] = values
    return ids


def _keys(seed: int, what: tuple[int, ...], epochs: np.ndarray) -> np.ndarray:
    """The round keys `uint64 [rounds]` where there is one epoch, or `[rounds, n]`, those of each of `epochs`."""

    def of(epoch: int) -> np.ndarray:
        return np.random.SeedSequence((seed, epoch), spawn_key=what).generate_state(_ROUNDS, np.uint64)

    if epochs.min() == epochs.max():
        return of(int(epochs[0]))
    found, number = np.unique(epochs, return_inverse=True)
    return np.stack([of(int(epoch)) for epoch in found], axis=1)[:, number]


def _network(values: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of the cells `[0, rows * columns)`, for each round key or column of keys."""
    left, right = np.divmod(values, np.uint64(columns))
    for i in range(0, _ROUNDS, 2):
        _add(left, right, np.uint64(rows), keys[i])
        _add(right, left, np.uint64(columns), keys[i + 1])
    return left * np.uint64(columns) + right


def _add(half: np.ndarray, other: np.ndarray, modulus: np.uint64, key: np.ndarray) -> None:
    """`half = (half + hash(other, key)) % modulus`, in place."""
    hashed = other + key
    for _ in range(2):
        hashed ^= hashed >> _HALF
        hashed *= _MIX
    hashed >>= _HALF
    hashed *= modulus  # from 32 random bits to [0, modulus) by a product and a shift, which is quicker than %
    hashed >>= _HALF
    half += hashed
    np.minimum(half, half - modulus, out=half)  # below the modulus the difference wraps round to a vast number

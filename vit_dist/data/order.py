"""Which example stands where in the stream that training sees.

The stream is endless: global position `p = step * batch_size + row` belongs to epoch `p // size`, and within an epoch
the examples are shuffled by a bijection that is *computed*, not stored. So any host can work out any part of any
epoch alone, a resume needs nothing but the step, and no list of a billion ids is kept or sent anywhere.
"""

import math

import numpy as np

_ROUNDS = 12  # with 8, the shuffles of five or six examples are visibly not all as likely
_CHUNK = 1 << 14  # positions worked on at a time: what stays in a core's cache
_HALF = np.uint64(32)
_MIX = np.uint64(0xD6E8FEB86659FD93)  # an odd constant that spreads a difference in any bit over the upper half


def example_ids(seed: int, size: int, positions: np.ndarray) -> np.ndarray:
    """The ids `int64 [n]` of the examples at global `positions` `int64 [n]`.

    Over positions `[k * size, (k + 1) * size)` every id of `[0, size)` comes exactly once, for every epoch `k`.
    """
    epochs, ranks = np.divmod(np.asarray(positions, np.int64), size)
    ids = np.empty_like(ranks)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = permutation(seed, int(epoch), size, ranks[here])
    return ids


def permutation(seed: int, epoch: int, size: int, positions: np.ndarray) -> np.ndarray:
    """A shuffle of `[0, size)`, evaluated at `positions` `int64 [n]` -> ids `int64 [n]`; `size` is at most 2**62.

    A Feistel network over a grid of `rows x columns >= size` cells, its halves mixed by modular addition (the
    generalised Feistel of Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). Where a value falls
    outside `[0, size)` the network is applied again until it is inside ("cycle walking"); the grid is so close to
    `size` that few are. The round keys come from `(seed, epoch)`.
    """
    positions = np.asarray(positions, np.int64)
    if positions.size and (positions.min() < 0 or positions.max() >= size):
        raise ValueError(f"positions must lie in [0, {size}), found {positions.min()} to {positions.max()}")
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    keys = np.random.SeedSequence((seed, epoch)).generate_state(_ROUNDS, np.uint64)
    ids = np.empty(positions.shape, np.int64)
    for start in range(0, len(positions), _CHUNK):
        values = _network(positions[start : start + _CHUNK].astype(np.uint64), rows, columns, keys)
        outside = np.flatnonzero(values >= size)
        while len(outside):
            values[outside] = _network(values[outside], rows, columns, keys)
            outside = outside[values[outside] >= size]
        ids[start : start + _CHUNK] = values
    return ids


def _network(values: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    """A bijection of the cells `[0, rows * columns)`."""
    left, right = np.divmod(values, np.uint64(columns))
    for i in range(0, _ROUNDS, 2):
        _add(left, right, np.uint64(rows), keys[i])
        _add(right, left, np.uint64(columns), keys[i + 1])
    return left * np.uint64(columns) + right


def _add(half: np.ndarray, other: np.ndarray, modulus: np.uint64, key: np.uint64) -> None:
    """`half = (half + hash(other, key)) % modulus`, in place."""
    hashed = other + key
    for _ in range(2):
        hashed ^= hashed >> _HALF
        hashed *= _MIX
    hashed >>= _HALF
    hashed *= modulus  # from 32 random bits to [0, modulus) by a product and a shift, which is quicker than %
    hashed >>= _HALF
    half += hashed
    half -= modulus * (half >= modulus)

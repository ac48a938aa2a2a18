"""Shuffles that are computed, not stored: any place of one is known without the others.

They are a function of a seed, of what is shuffled and of an epoch.
"""

import math

import numpy as np

_ROUNDS = 12  # with 8, the shuffles of five or six examples are visibly not all as likely
_CHUNK = 1 << 14  # positions worked on at a time: what stays in a core's cache
_HALF = np.uint64(32)
_MIX = np.uint64(0xD6E8FEB86659FD93)  # an odd constant that spreads a difference in any bit over the upper half


def permutation(seed: int, epoch: int, size: int, positions: np.ndarray) -> np.ndarray:
    """A shuffle of `[0, size)`, evaluated at `positions` `int64 [n]` -> ids `int64 [n]`; `size` is at most 2**62."""
    positions = np.asarray(positions, np.int64)
    if positions.size and (positions.min() < 0 or positions.max() >= size):
        raise ValueError(f"positions must lie in [0, {size}), found {positions.min()} to {positions.max()}")
    return shuffled(seed, (), np.full_like(positions, epoch), size, positions)


def shuffled(seed: int, what: tuple[int, ...], epochs: np.ndarray, size: int, ranks: np.ndarray) -> np.ndarray:
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

"""Computes shuffles instead of storing them: any element of a shuffle is known without the others.

A shuffle is a function of a seed, a key that says what is shuffled, and an epoch.
"""

import math

import numpy as np

_ROUNDS = 12  # with 8, some shuffles of five or six examples are visibly likelier than others
_CHUNK = 1 << 14  # positions computed at a time, so that the arrays stay in a core's cache
_HALF = np.uint64(32)
_MIX = np.uint64(0xD6E8FEB86659FD93)  # an odd constant that spreads a difference in any bit over the upper half


def example_ids(seed: int, size: int, positions: np.ndarray) -> np.ndarray:
    """Returns the ids `int64 [n]` at `positions` `int64 [n]` of the stream of one source of `size` examples.

    Positions `[k * size, (k + 1) * size)`, which are epoch `k`, contain every id of `[0, size)` exactly once.
    """
    epochs, offsets = np.divmod(np.asarray(positions, np.int64), size)
    return shuffled(seed, (), epochs, size, offsets)


def shuffled(seed: int, spawn_key: tuple[int, ...], epochs: np.ndarray, size: int, positions: np.ndarray) -> np.ndarray:
    """Returns the id at each position of a shuffle of `[0, size)`, of which every epoch has another.

    The shuffle is a Feistel cipher over a grid of `rows x columns >= size` cells, its halves mixed by modular addition
    (the generalised Feistel of Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). A value outside
    `[0, size)` is enciphered again until it is inside ("cycle walking"); these are few, since the grid has hardly more
    than `size` cells.

    Args:
      seed: the run's seed.
      spawn_key: tells apart the shuffles of one seed, as in `numpy.random.SeedSequence`.
      epochs: `int64 [n]`, the epoch of each position.
      size: how many ids there are, at most 2**62.
      positions: `int64 [n]`, in `[0, size)`.

    Returns:
      ids `int64 [n]`.
    """
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    ids = np.empty(positions.shape, np.int64)
    for start in range(0, len(positions), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        keys = _round_keys(seed, spawn_key, epochs[chunk])
        values = _encipher(positions[chunk].astype(np.uint64), rows, columns, keys)
        outside = np.flatnonzero(values >= size)
        while len(outside):
            values[outside] = _encipher(values[outside], rows, columns, keys if keys.ndim == 1 else keys[:, outside])
            outside = outside[values[outside] >= size]
        ids[chunk] = values
    return ids


def _round_keys(seed: int, spawn_key: tuple[int, ...], epochs: np.ndarray) -> np.ndarray:
    """Returns round keys: `uint64 [rounds]` if all of `epochs` are one epoch, otherwise `[rounds, n]`."""

    def of_epoch(epoch: int) -> np.ndarray:
        return np.random.SeedSequence((seed, epoch), spawn_key=spawn_key).generate_state(_ROUNDS, np.uint64)

    if epochs.min() == epochs.max():
        return of_epoch(int(epochs[0]))
    distinct, index = np.unique(epochs, return_inverse=True)
    return np.stack([of_epoch(int(epoch)) for epoch in distinct], axis=1)[:, index]


def _encipher(values: np.ndarray, rows: int, columns: int, keys: np.ndarray) -> np.ndarray:
    """Maps the cells `[0, rows * columns)` onto themselves, by `keys` `[rounds]` or `[rounds, n]`."""
    left, right = np.divmod(values, np.uint64(columns))
    for i in range(0, _ROUNDS, 2):
        _add(left, right, np.uint64(rows), keys[i])
        _add(right, left, np.uint64(columns), keys[i + 1])
    return left * np.uint64(columns) + right


def _add(half: np.ndarray, other: np.ndarray, modulus: np.uint64, key: np.ndarray) -> None:
    """Sets `half = (half + hash(other, key)) % modulus` in place."""
    hashed = other + key
    for _ in range(2):
        hashed ^= hashed >> _HALF
        hashed *= _MIX
    hashed >>= _HALF
    hashed *= modulus  # maps 32 random bits to [0, modulus) by a product and a shift, which is quicker than %
    hashed >>= _HALF
    half += hashed
    np.minimum(half, half - modulus, out=half)  # where half < modulus, the difference wraps round to a huge number

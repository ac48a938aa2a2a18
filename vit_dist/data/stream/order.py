"""Computes the order of the examples in the stream that training sees.

The stream is endless, and its order is *computed*, not stored: the example at global position `p = step * batch_size +
row` is a function of the seed and `p` alone. So any host can compute any section of any epoch by itself, a run resumes
from the step alone on any number of hosts, and no list of a billion ids is stored or sent.
"""

import dataclasses
import functools
import itertools
import math
from fractions import Fraction

import numpy as np

from vit_dist.data.shuffle import example_ids, shuffled

BLOCK = 1 << 14  # slots of a mixture's stream that its sources share; the smallest share is therefore 1/16384
_CHUNK = 1 << 12  # positions whose ids are computed and cached together, since a batch may need only a few
_SLOTS, _SOURCE = 0, 1  # first number of the spawn key that shuffles the slots of a block, or a source of a mixture


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of the examples of one source, or of a mixture of several.

    `sizes` are the numbers of examples of each source; the ids of a source follow those of the source before it.

    Without `weights`, every id occurs exactly once an epoch, and epoch `k` is positions `[k * size, (k + 1) * size)`.
    With weights, one for each source, every `BLOCK` positions contain each source in proportion to its weight, and at
    least once. A source yields all its examples before it repeats any, but for the shuffle of positions in a block.

    `repeats` is how many times in a row an example occurs, to be augmented differently each time; an epoch is longer by
    that factor (Hoffer et al. 2019, arXiv:1901.09335; Berman et al. 2019, arXiv:1902.05509).
    """

    seed: int
    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    repeats: int = 1

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """Returns the ids `int64 [n]` of the examples at global `positions` `int64 [n]`."""
        positions = np.asarray(positions, np.int64) // self.repeats
        if not len(positions):
            return positions
        first, last = int(positions.min()) // _CHUNK, int(positions.max()) // _CHUNK
        if last - first > 1:
            return self._ids(positions)
        chunks = [_chunk_ids(self, number) for number in range(first, last + 1)]
        return (chunks[0] if first == last else np.concatenate(chunks))[positions - first * _CHUNK]

    def _ids(self, positions: np.ndarray) -> np.ndarray:
        """Returns the ids at `positions` of the stream in which no example is repeated."""
        if self.weights is None or len(self.sizes) == 1:
            return example_ids(self.seed, sum(self.sizes), positions)
        slots = block_slots(self.weights)
        ends = tuple(itertools.accumulate(slots))
        blocks, slot = np.divmod(positions, BLOCK)
        slot = shuffled(self.seed, (_SLOTS,), blocks, BLOCK, slot)
        source = np.searchsorted(ends, slot, side="right")
        ids, first_id = np.empty_like(positions), 0
        for number, size in enumerate(self.sizes):
            rows = np.flatnonzero(source == number)
            source_positions = blocks[rows] * slots[number] + slot[rows] - (ends[number] - slots[number])
            epochs, offsets = np.divmod(source_positions, size)
            ids[rows] = first_id + shuffled(self.seed, (_SOURCE, number), epochs, size, offsets)
            first_id += size
        return ids


@functools.lru_cache(maxsize=32)
def _chunk_ids(order: Order, number: int) -> np.ndarray:
    """Returns the ids of a chunk of the stream, cached: to compute a few ids takes about as long as to compute all."""
    return order._ids(np.arange(number * _CHUNK, (number + 1) * _CHUNK))


@functools.lru_cache(maxsize=32)
def block_slots(weights: tuple[float, ...]) -> tuple[int, ...]:
    """Divides `BLOCK` slots by weight: by largest remainder, and at least one each.

    Raises `ValueError` if there are more weights than slots, or a weight is not finite and above 0.
    """
    if len(weights) > BLOCK or not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights: expected at most {BLOCK} numbers above 0, found {weights}")
    exact = [Fraction(str(weight)) for weight in weights]  # so that 0.3 and 0.1 give the same shares as 3 and 1
    total = sum(exact)
    shares = [weight * BLOCK / total for weight in exact]
    slots = [max(1, math.floor(share)) for share in shares]
    while sum(slots) < BLOCK:
        slots[max(range(len(slots)), key=lambda k: shares[k] - slots[k])] += 1
    while sum(slots) > BLOCK:
        slots[max((k for k in range(len(slots)) if slots[k] > 1), key=lambda k: slots[k] - shares[k])] -= 1
    return tuple(slots)

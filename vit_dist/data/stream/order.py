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

from vit_dist.data.shuffle import shuffled

BLOCK = 1 << 14  # slots of a mixture's stream that are shared out together, and so the finest share: 1/16384
_STRETCH = 1 << 12  # positions whose ids are worked out together and kept: a batch may ask for a few only
_SLOTS, _PART = 0, 1  # what a key shuffles beside a whole set: the slots of a mixture's block, one of its parts


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
        slot = shuffled(self.seed, (_SLOTS,), blocks, BLOCK, slot)
        part = np.searchsorted(ends, slot, side="right")
        ids, first_id = np.empty_like(places), 0
        for number, size in enumerate(self.sizes):
            here = np.flatnonzero(part == number)
            index = blocks[here] * slots[number] + slot[here] - (ends[number] - slots[number])
            epochs, ranks = np.divmod(index, size)  # of this part's own stream
            ids[here] = first_id + shuffled(self.seed, (_PART, number), epochs, size, ranks)
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
    return shuffled(seed, (), epochs, size, ranks)

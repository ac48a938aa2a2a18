"""The largest batch that fits, found by as few compilations as may be.

Memory grows with the batch very nearly in a straight line, so two compilations say where it meets the device's memory;
what the compiler says there moves the line, until the largest that fits and the smallest that does not are neighbours.
"""

import logging
from collections.abc import Callable

_log = logging.getLogger(__name__)

TRIES = 12  # compilations


def largest_multiple(peak_bytes: Callable[[int], int], limit: int) -> int:
    """The largest n whose `peak_bytes(n)` is at most `limit`, 0 where not even 1 is; peak_bytes: nearly linear in n.

    After `TRIES` calls the largest that was found to fit.
    """
    known = {1: peak_bytes(1)}
    if known[1] > limit:
        return 0
    fits, fails, guess = 1, None, 2
    while len(known) < TRIES and (fails is None or fails - fits > 1):
        known[guess] = peak_bytes(guess)
        if known[guess] <= limit:
            fits = max(fits, guess)
        else:
            fails = guess if fails is None else min(fails, guess)
        guess = _guess(known, fits, fails, limit)
    if fails is None or fails - fits > 1:
        _log.warning("%d compilations were not enough: there may be a larger batch that fits", TRIES)
    return fits


def _guess(known: dict[int, int], fits: int, fails: int | None, limit: int) -> int:
    """What to try next, between what fits and what does not."""
    if fails is not None and len(known) % 2:  # in turn with the line, which a jump can deceive again and again
        return max((fits + fails) // 2, fits + 1)
    low, high = (fits, fails) if fails is not None else sorted(known)[-2:]
    slope = (known[high] - known[low]) / (high - low)
    guess = max(low + int((limit - known[low]) // slope), fits + 1) if slope > 0 else 2 * fits
    return min(guess, 16 * fits) if fails is None else min(guess, fails - 1)

"""Searches for the largest batch that fits, with few compilations.

Memory grows almost linearly with the batch, so two compilations predict where it reaches the device's memory. Each
compilation at the predicted batch corrects the line, until the largest batch that fits and the smallest that does not
are neighbours.
"""

import logging
from collections.abc import Callable

_log = logging.getLogger(__name__)

TRIES = 12  # compilations


def largest_multiple(peak_bytes: Callable[[int], int], limit: int) -> int:
    """Returns the largest n with `peak_bytes(n) <= limit`, 0 if there is none.

    Args:
      peak_bytes: grows almost linearly with n; called at most `TRIES` times, after which the largest n that was seen to
        fit is returned.
      limit: bytes of a device's memory.
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
    """Returns the n to try next, between the largest that fits and the smallest that fails."""
    if fails is not None and len(known) % 2:  # every second time, because a jump in memory can mislead the line
        return max((fits + fails) // 2, fits + 1)
    low, high = (fits, fails) if fails is not None else sorted(known)[-2:]
    slope = (known[high] - known[low]) / (high - low)
    guess = max(low + int((limit - known[low]) // slope), fits + 1) if slope > 0 else 2 * fits
    return min(guess, 16 * fits) if fails is None else min(guess, fails - 1)

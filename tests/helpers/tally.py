"""Counts the faults that tests inflict, for the table of `make chaos`."""

import contextlib
import os
import types

ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))  # multiplies what is tried


class Tally:
    """Counts by fault: how often it was tried, and how often no harm came of it."""

    def __init__(self):
        self.counts: dict[str, list[int]] = {}

    @contextlib.contextmanager
    def attempts(self, fault: str, count: int = 0):
        """So many faults are inflicted in this block, which ends without an error if no harm came of them.

        The block may change `count` of what it is given.
        """
        inside = types.SimpleNamespace(count=count)
        counts = self.counts.setdefault(fault, [0, 0])
        try:
            yield inside
            counts[1] += inside.count
        finally:
            counts[0] += inside.count

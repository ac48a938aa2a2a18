"""Measures where the time of making batches goes: reading, decoding, augmenting, copying.

Each piece of a batch carries the seconds that its thread spent on each stage. Their sums show which stage to improve
when the devices wait for data.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator


@dataclasses.dataclass
class Timings:
    """Seconds that all threads together spent reading bytes, decoding (with crop and resize), augmenting and copying.

    One thread copies; several threads or processes share the other three.
    """

    read: float = 0.0
    decode: float = 0.0
    augment: float = 0.0
    copy: float = 0.0

    def add(self, other: "Timings") -> None:
        """Adds another's seconds to these."""
        for name in NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def since(self, before: "Timings") -> "Timings":
        """Returns the seconds spent since `before`, an earlier copy of these."""
        return Timings(*(getattr(self, name) - getattr(before, name) for name in NAMES))

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time that the `with` block takes to the stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)

    def slowest(self, parallel: int) -> str:
        """Returns the stage that a batch waits for longest, if `parallel` threads share all stages but the copying."""
        slowest_shared = max(NAMES[:3], key=lambda name: getattr(self, name))
        shared_seconds = (self.read + self.decode + self.augment) / parallel
        return "copy" if self.copy > shared_seconds else slowest_shared


NAMES = tuple(field.name for field in dataclasses.fields(Timings))

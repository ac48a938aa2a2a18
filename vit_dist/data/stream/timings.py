"""Where the time of making batches goes: reading, decoding, augmenting, copying.

Each piece of a batch brings along the seconds that its thread spent on each; summed up, they say which stage to mend
when the devices wait for data.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator


@dataclasses.dataclass
class Timings:
    """Seconds spent, over all threads: reading bytes, decoding with crop and resize, augmenting, and copying.

    Copying is done by one thread, the other three by `parallel` of them.
    """

    read: float = 0.0
    decode: float = 0.0
    augment: float = 0.0
    copy: float = 0.0

    def add(self, other: "Timings") -> None:
        for name in NAMES:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def since(self, before: "Timings") -> "Timings":
        return Timings(*(getattr(self, name) - getattr(before, name) for name in NAMES))

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the time that the block takes to the stage of this name."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, name, getattr(self, name) + time.perf_counter() - begun)

    def slowest(self, parallel: int) -> str:
        """The stage that a batch waits for longest, where `parallel` threads share all but the copying."""
        shared = max(NAMES[:3], key=lambda name: getattr(self, name))
        made = (self.read + self.decode + self.augment) / parallel
        return "copy" if self.copy > made else shared


NAMES = tuple(field.name for field in dataclasses.fields(Timings))

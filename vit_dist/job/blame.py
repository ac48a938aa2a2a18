"""Which process is at fault, told by a process of a launched job to its launcher through a pipe of their own.

What a process prints is for people. Its launcher must know who is at fault, whatever the words are.
"""

import contextlib
import dataclasses
import json
import os

VARIABLE = "VIT_DIST_BLAME"  # the descriptor that a launched process writes to; unset: it has no launcher


@dataclasses.dataclass(frozen=True)
class Blame:
    """Process `index` of the job is at fault; `reason` says so in words."""

    index: int
    reason: str

    def report(self) -> None:
        """Tells the launcher, if there is one that still listens."""
        descriptor = os.environ.get(VARIABLE, "")
        if descriptor.isdecimal():
            with contextlib.suppress(OSError):
                os.write(int(descriptor), json.dumps(dataclasses.asdict(self)).encode() + b"\n")


def read(text: bytes) -> Blame | None:
    """The first blame in what a process has written, None where it has blamed nobody."""
    line, end, _ = text.partition(b"\n")
    return Blame(**json.loads(line)) if end else None

"""Blame: the process at fault, as a launched process reports it to its launcher through a pipe made for that.

What a process prints is for people. The launcher needs the number of the process at fault, whatever the wording is.
"""

import contextlib
import dataclasses
import json
import os

VARIABLE = "VIT_DIST_BLAME"  # the file descriptor that a launched process writes to; unset without a launcher


@dataclasses.dataclass(frozen=True)
class Blame:
    """Process `index` of the job is at fault; `reason` is the explanation for people."""

    index: int
    reason: str

    def report(self) -> None:
        """Sends the blame to the launcher, if there is one and it still reads."""
        descriptor = os.environ.get(VARIABLE, "")
        if descriptor.isdecimal():
            with contextlib.suppress(OSError):
                os.write(int(descriptor), json.dumps(dataclasses.asdict(self)).encode() + b"\n")


def read(data: bytes) -> Blame | None:
    """Returns the first blame in the bytes that a process wrote, or None if it blamed nobody."""
    first, end, _ = data.partition(b"\n")
    return Blame(**json.loads(first)) if end else None

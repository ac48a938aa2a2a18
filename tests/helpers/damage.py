"""Damages the files of a checkpoint, one at a time: a bit flipped, half of it cut off, emptied, deleted."""

import dataclasses
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

KINDS = ("flipped", "cut", "emptied", "deleted")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What to do to a file, named from the folder of the checkpoint."""

    file: str
    kind: str

    def inflict(self, folder: Path) -> None:
        """Damages the file; which bit is flipped follows from its name."""
        path = folder / self.file
        content = bytearray(path.read_bytes())
        if self.kind == "deleted":
            path.unlink()
            return
        if self.kind == "flipped":
            chosen = random.Random(self.file).choice(_bytes_with_meaning(bytes(content)))
            content[chosen] ^= 1 << chosen % 8
        path.write_bytes({"cut": content[: len(content) // 2], "emptied": b""}.get(self.kind, content))


def _bytes_with_meaning(content: bytes) -> list[int]:
    """The places of all bytes but the digits of when Orbax committed, which it writes last and nothing reads."""
    unread = re.search(rb'"commit_timestamp_nsecs": (\d+)', content)
    return [place for place in range(len(content)) if not (unread and unread.start(1) <= place < unread.end(1))]


def faults(folder: Path) -> list[Fault]:
    """Every kind of fault of every file of a checkpoint, those of a file one after the other."""
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return [Fault(file, kind) for file in files for kind in KINDS]


def inflicted(checkpoints: Path, step: int, chosen: list[Fault]) -> Iterator[Fault]:
    """Yields each fault while it is in a step of these checkpoints, which are put back afterwards."""
    whole = checkpoints.with_name("whole")
    shutil.copytree(checkpoints, whole)
    for fault in chosen:
        fault.inflict(checkpoints / str(step))
        yield fault
        shutil.rmtree(checkpoints)
        shutil.copytree(whole, checkpoints)
    shutil.rmtree(whole)

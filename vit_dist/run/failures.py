"""`failures/bad_images.jsonl`: every example of a run that could not be read or decoded, a row each, once.

A row is `{"step", "split", "id", "name", "reason"}`, the step being that at which it was first noted. Each process
meets only the bad files among its own rows; they tell each other, so that the list, the count, and the step at which it
is too many are the same on any number of hosts, and the same after a kill and a resume.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import jax

from vit_dist.data.stream.bad_examples import BadExample, check_bad
from vit_dist.job import processes
from vit_dist.run.files import write_atomically

FILE = "failures/bad_images.jsonl"
_log = logging.getLogger(__name__)


class BadExampleList:
    """The bad examples of a run, over all processes; process 0 writes them down."""

    def __init__(self, workdir: Path, *, resume_step: int):
        """Keeps what earlier sessions noted up to `resume_step`; all processes read it."""
        self._file = workdir / FILE
        self._noted: dict[str, dict[int, tuple[int, BadExample]]] = {}  # split -> id -> the step, and what was wrong
        lines = self._file.read_text().split("\n") if self._file.exists() else []
        for row in map(json.loads, filter(None, lines)):
            if row["step"] <= resume_step:
                found = BadExample(row["id"], row["name"], row["reason"])
                self._noted.setdefault(row["split"], {})[found.id] = row["step"], found

    def note(self, step: int, split: str, bad: Sequence[BadExample]) -> int:
        """Adds what this process has skipped of a split; returns how many examples of it all have skipped so far.

        To be called by all processes together.
        """
        known = self._noted.setdefault(split, {})
        new = everyones([one for one in bad if one.id not in known])
        for one in new:
            _log.warning("%s: skipped %s: %s", split, one.name, one.reason)
            known[one.id] = step, one
        if new and jax.process_index() == 0:
            self._file.parent.mkdir(exist_ok=True)
            rows = [
                json.dumps({"step": when, "split": name, **one._asdict()})
                for name, noted in self._noted.items()
                for when, one in noted.values()
            ]
            write_atomically(self._file, "\n".join(rows) + "\n")
        return len(known)

    def check(self, split: str, max_bad_fraction: float, examples: int) -> None:
        """Raises `ConfigError`, on all processes alike, where more of a split was skipped than may be."""
        check_bad([bad for _, bad in self._noted.get(split, {}).values()], max_bad_fraction, examples)


def everyones(bad: Sequence[BadExample]) -> list[BadExample]:
    """What all processes have skipped, each example once, in the order of ids. To be called by all together."""
    examples = {row[0]: BadExample(*row) for rows in processes.gather(list(bad)) for row in rows}
    return [examples[number] for number in sorted(examples)]

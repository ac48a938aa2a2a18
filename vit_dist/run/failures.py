"""`failures/bad_images.jsonl`: one row for each example of a run that could not be read or decoded.

A row is `{"step", "split", "id", "name", "reason"}`, with the step at which the example was first noted. Each process
finds only the bad files among its own rows of the batch. The processes gather them, so that the list, the count, and
the step at which there are too many are the same on any number of hosts, and after a kill and a resume.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import jax

from vit_dist.data.stream.bad_examples import BadExample, check_bad
from vit_dist.job import processes
from vit_dist.run.files import TEXT, WHOLE, read_json_lines, write_atomically

FILE = "failures/bad_images.jsonl"
_ROW = {"step": WHOLE, "split": TEXT, "id": WHOLE, "name": TEXT, "reason": TEXT}
_log = logging.getLogger(__name__)


class BadExampleList:
    """The bad examples of a run, over all processes; process 0 writes the file."""

    def __init__(self, workdir: Path, *, resume_step: int):
        """Reads what earlier sessions noted up to `resume_step`, on every process."""
        self._file = workdir / FILE
        self._noted: dict[str, dict[int, tuple[int, BadExample]]] = {}  # split -> id -> (step, example)
        for _, row in read_json_lines(self._file, _ROW):
            if row["step"] <= resume_step:
                example = BadExample(row["id"], row["name"], row["reason"])
                self._noted.setdefault(row["split"], {})[example.id] = row["step"], example

    def note(self, step: int, split: str, bad: Sequence[BadExample]) -> int:
        """Adds the examples of a split that this process skipped; all processes call it together.

        Args:
          step: the step at which they are noted.
          split: the name of the split.
          bad: the examples; those noted before are ignored.

        Returns:
          The number of examples of the split that all processes have skipped so far.
        """
        known = self._noted.setdefault(split, {})
        new = gather_bad_examples([example for example in bad if example.id not in known])
        for example in new:
            _log.warning("%s: skipped %s: %s", split, example.name, example.reason)
            known[example.id] = step, example
        if new and jax.process_index() == 0:
            self._file.parent.mkdir(exist_ok=True)
            rows = [
                json.dumps({"step": first_step, "split": name, **example._asdict()})
                for name, noted in self._noted.items()
                for first_step, example in noted.values()
            ]
            write_atomically(self._file, "\n".join(rows) + "\n")
        return len(known)

    def check(self, split: str, max_bad_fraction: float, examples: int) -> None:
        """Raises `ConfigError`, on all processes alike, if too large a share of the split's `examples` was skipped."""
        check_bad([example for _, example in self._noted.get(split, {}).values()], max_bad_fraction, examples)


def gather_bad_examples(bad: Sequence[BadExample]) -> list[BadExample]:
    """Returns the bad examples of all processes, each once, in the order of ids; all processes call it together."""
    examples = {row[0]: BadExample(*row) for rows in processes.gather(list(bad)) for row in rows}
    return [examples[id_] for id_ in sorted(examples)]

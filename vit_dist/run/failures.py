"""`failures/bad_images.jsonl`: every example of a run that could not be read or decoded, a row each, once.

A row is `{"split", "id", "name", "reason"}`. Each process meets only the bad files among its own rows; they tell each
other at every row of metrics, so that the list and the count are those of the whole job on any number of hosts.
"""

import json
from pathlib import Path

import jax

from vit_dist.data.bad import Bad, check_bad
from vit_dist.mesh import processes
from vit_dist.run.files import write_atomically

FILE = "failures/bad_images.jsonl"


class BadImages:
    """The bad examples of a run, over all processes; process 0 writes them down."""

    def __init__(self, workdir: Path):
        self._file = workdir / FILE
        self._found: dict[str, dict[int, Bad]] = {}
        self._rows: dict[tuple[str, int], str] = {}  # those of earlier sessions too
        if self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines(keepends=True):
                row = json.loads(line)
                self._rows[row["split"], row["id"]] = line

    def note(self, split: str, bad: list[Bad]) -> int:
        """Adds what this process has skipped of a split; returns how many examples of it this session has skipped.

        To be called by all processes together.
        """
        known = self._found.setdefault(split, {})
        for told in processes.gather([one for one in bad if one.id not in known]):
            known.update({number: Bad(number, name, reason) for number, name, reason in told})
        before = len(self._rows)
        for one in known.values():
            self._rows.setdefault(
                (split, one.id), json.dumps({"split": split, **one._asdict()}, ensure_ascii=False) + "\n"
            )
        if len(self._rows) > before and jax.process_index() == 0:
            self._file.parent.mkdir(exist_ok=True)
            write_atomically(self._file, "".join(self._rows.values()))
        return len(known)

    def check(self, split: str, max_bad_fraction: float, examples: int) -> None:
        """Raises `ConfigError`, on all processes alike, where more of a split was skipped than may be."""
        check_bad(list(self._found.get(split, {}).values()), max_bad_fraction, examples)

"""One part of a visit, run in a process of its own: what it is told, and how it writes down what it finds.

    python -m visit.job MODULE:FUNCTION ORDERS RESULT

calls the function with a `Job`. The file RESULT is written anew each time the part has found something, so that a
crash, a kill or a hang loses no more than what was under way. Nothing here imports jax: a part does, if it needs it.
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

GPU = ("gpu", "cuda")  # what jax calls the platform


class Skipped(Exception):
    """The part has nothing to run on here, and that is no failure; says why."""


class Job:
    """What one part is told, and what it has found so far.

    arguments: its own, from the table of parts. kit: the folder that travelled along. scratch: a folder for the
    visit's temporary files. out: the folder of the visit's results.
    """

    def __init__(self, orders: dict[str, Any], result: Path):
        self.arguments: dict[str, Any] = orders["arguments"]
        self.dry_run: bool = orders["dry_run"]
        self.kit, self.scratch, self.out = (Path(orders[name]) for name in ("kit", "scratch", "out"))
        self._file = result
        self._outcome: dict[str, Any] = {"status": "running", "reason": None, "result": {}, "checks": []}

    @property
    def found(self) -> dict[str, Any]:
        """What was kept so far."""
        return self._outcome["result"]

    def keep(self, **found: Any) -> None:
        """Adds to the part's result."""
        self._outcome["result"] |= found
        self._write()

    def check(self, claim: str, holds: bool, found: str) -> None:
        """Notes whether a claim holds, and the figures that say so; one that does not makes the part a failure."""
        self._outcome["checks"].append({"claim": claim, "holds": bool(holds), "found": found})
        self._write()

    def end(self, status: str, reason: str | None = None) -> None:
        """Notes how the part has ended."""
        self._outcome |= {"status": status, "reason": reason}
        self._write()

    def failed_claims(self) -> list[str]:
        """The claims that did not hold, with what was found."""
        return [f"{one['claim']}: {one['found']}" for one in self._outcome["checks"] if not one["holds"]]

    def kit_file(self, name: str) -> Path:
        """A file of the kit. Raises `Skipped` where it is not there."""
        file = self.kit / name
        if not file.exists():
            raise Skipped(f"the kit has no {name}; make visit-kit makes it")
        return file

    def device(self) -> Any:
        """The first device (`jax.Device`), which is a GPU but in a dry run. Raises `RuntimeError` where it is not."""
        import jax

        device = jax.devices()[0]
        if not self.dry_run and device.platform not in GPU:
            raise RuntimeError(f"jax sees no GPU, but {jax.devices()}")
        return device

    def _write(self) -> None:
        partial = self._file.with_suffix(".tmp")
        partial.write_text(json.dumps(self._outcome), encoding="utf-8")
        os.replace(partial, self._file)


def main(function: str, orders: str, result: str) -> None:
    """Runs a part; what it raises, but for `Skipped`, ends the process with its traceback."""
    job = Job(json.loads(orders), Path(result))
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(job)
    except Skipped as skipped:
        job.end("skipped", str(skipped))
        return
    failed = job.failed_claims()
    job.end("failed" if failed else "ok", "; ".join(failed) or None)


if __name__ == "__main__":
    # as `visit.job` and not as `__main__`, so that the part's `Skipped` is the one that is caught
    importlib.import_module("visit.job").main(*sys.argv[1:])

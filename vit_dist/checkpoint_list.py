"""`checkpoints`: the saved steps of a run, whether they are whole, and what may be removed."""

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.paths import expanded
from vit_dist.run import step_record, whole
from vit_dist.run.falling_back import ASIDE
from vit_dist.run.step_record import Damaged

_INTERRUPTED = ".orbax-checkpoint-tmp"  # in the name of a folder that a save has not completed
_IDLE_SECONDS = 900  # after which it is no save under way


def checkpoints(workdir: str | Path, *, verify: bool = False, prune: bool = False) -> list[dict[str, Any]]:
    """Lists the saved steps of a run, then what was set aside or left by interrupted saves.

    Args:
      workdir: the directory of the run.
      verify: whether to read every tensor and to compare it with its digest; else only the files are looked at.
      prune: whether to remove what was set aside, and what interrupted saves have left.

    Returns:
      For each step and folder `name`, `step` (None: it is none), `bytes`, `metrics`, `digests` (whether there are any),
      `damage` (a reason, or None) and `state`: "whole", "readable" (without digests no more can be told), "not
      verified", "damaged", "set aside", "interrupted", "being saved" or "removed".

    Raises:
      ConfigError: there are no checkpoints.
    """
    directory = expanded(workdir, "workdir") / "checkpoints"
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no checkpoints here; give the workdir of a run that has saved one")
    rows = []
    for step in step_record.steps_in(directory):
        folder = directory / str(step)
        with contextlib.suppress(FileNotFoundError):  # a run that trains here deletes it
            row = _step(folder, verify)
            rows += [row] if folder.is_dir() else []
    for folder in sorted(directory.iterdir()):
        with contextlib.suppress(FileNotFoundError):
            rows += _other(folder, prune)
    return rows


def _step(folder: Path, verify: bool) -> dict[str, Any]:
    row = dict[str, Any](
        name=folder.name, step=int(folder.name), bytes=step_record.bytes_of(folder), metrics={}, digests=None
    )
    problem: Damaged | None = None
    try:
        row["digests"] = step_record.read(folder) is not None
        row["metrics"] = step_record.metrics_of(folder)
        whole.checked_record(folder)
    except Damaged as error:
        problem = error
    if problem is None and verify:
        problem = whole.problem(folder)
    read = "whole" if row["digests"] else "readable"
    state = "damaged" if problem else read if verify else "not verified"
    return row | {"damage": problem and problem.reason, "state": state}


def _other(folder: Path, prune: bool) -> list[dict[str, Any]]:
    """Returns the row of a folder that is no step; none for one that is nothing of ours."""
    if folder.name.startswith(ASIDE):
        state = "set aside"
    elif _INTERRUPTED in folder.name:
        newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
        state = "interrupted" if time.time() - newest > _IDLE_SECONDS else "being saved"
    else:
        return []
    size = step_record.bytes_of(folder)
    if prune and state != "being saved":
        shutil.rmtree(folder)
        state = "removed"
    nothing: dict[str, Any] = {"step": None, "metrics": {}, "digests": None, "damage": None}
    return [{"name": folder.name, "bytes": size, **nothing, "state": state}]

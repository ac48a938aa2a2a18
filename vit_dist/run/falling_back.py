"""How a resumed run passes over damaged checkpoints: it sets them aside and goes on from an older one."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

from vit_dist.config import ConfigError
from vit_dist.job import processes
from vit_dist.run import step_record
from vit_dist.run.checkpoints import Checkpoints, Trees
from vit_dist.run.step_record import Damaged

ASIDE = "corrupt-"  # the beginning of the name of a step that was set aside

_log = logging.getLogger(__name__)


class Found(NamedTuple):
    """A step that was read: `trees` by name, and the `metadata` that it was saved with."""

    step: int
    trees: dict[str, Any]
    metadata: dict[str, Any]


def restore_newest_whole(checkpoints: Checkpoints, abstract: Trees) -> Found | None:
    """Reads the newest step that is whole; sets aside those after it, and any whose metrics cannot be read.

    In a job of several processes, all call it; process 0 renames. Nothing is renamed if no step is whole.

    Args:
      checkpoints: those of the run.
      abstract: as for `Checkpoints.restore`.

    Returns:
      The step; None if there is none at all.

    Raises:
      ConfigError: steps exist, but none of them is whole; or as `Checkpoints.restore`.
    """
    steps = processes.gather(checkpoints.steps())[0]
    damaged = dict[int, Damaged]()
    for step in reversed(steps):
        try:
            trees = checkpoints.load(abstract, step)
            found = Found(step, trees, checkpoints.metadata(step))
        except Damaged as error:
            damaged[step] = error
            continue
        damaged |= _with_unreadable_metrics(checkpoints.directory, [one for one in steps if one < step])
        if processes.index() == 0:
            for number, problem in damaged.items():
                name = _set_aside(checkpoints.directory, number)
                _log.warning("%s; set aside as %s, going on from step %d", problem, name, step)
        processes.gather(None)
        return found
    if damaged:
        reasons = "; ".join(f"step {step}: {problem.reason}" for step, problem in damaged.items())
        raise ConfigError(
            f"{checkpoints.directory}: no checkpoint is whole ({reasons}); restore the folder from a copy, or "
            "remove it to begin again from step 0"
        )
    return None


def _with_unreadable_metrics(directory: Path, steps: list[int]) -> dict[int, Damaged]:
    """Returns the steps that Orbax, which reads the metrics of all steps when it opens the folder, would fail at."""
    found = dict[int, Damaged]()
    for step in steps:
        try:
            step_record.metrics_of(directory / str(step))
        except Damaged as error:
            found[step] = error
    return found


def _set_aside(directory: Path, step: int) -> str:
    """Renames a step; returns its new name, which no other folder has."""
    names = (f"{ASIDE}{step}", *(f"{ASIDE}{step}-{number}" for number in range(2, 1000)))
    name = next(name for name in names if not (directory / name).exists())
    (directory / str(step)).rename(directory / name)
    return name

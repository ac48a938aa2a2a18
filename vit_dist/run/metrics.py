"""What a run measures: rows of `metrics.jsonl`, TensorBoard's event files, and a profile on request.

One row a step and split, in the order of writing. The file is the run's record, so a resume makes it say what a run
never interrupted would have written: rows past the step resumed from are cut before the first new one.
"""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_dist.config import ConfigError
from vit_dist.run.clu_writers import SummaryWriter, metric_writers, periodic_actions
from vit_dist.run.files import write_atomically

ROWS = "metrics.jsonl"
_log = logging.getLogger(__name__)


class MetricLog:
    """Rows and event files of one run. Only process 0 makes one."""

    def __init__(self, workdir: Path, *, resume_step: int | None):
        """Keeps what an earlier session wrote up to `resume_step`, and nothing of it where that is None."""
        _cut(workdir / ROWS, resume_step)
        self._rows = JsonLinesWriter(workdir / ROWS)
        events = SummaryWriter(
            workdir / "tensorboard",
            purge_step=0 if resume_step is None else resume_step + 1,
            filename_suffix=f".{time.time_ns()}",
        )
        self._all = metric_writers.MultiWriter([events, self._rows])

    def write(self, step: int, split: str, values: Mapping[str, float | int | str | list | None]) -> None:
        """One row; its numbers go to TensorBoard too, as `split/name`. A None is left out: it is not known.

        Names hold no `/`. An array or list of several numbers goes to the row alone, as text does.
        """
        tagged = {f"{split}/{name}": value for name, value in values.items() if value is not None}
        texts = {tag: value for tag, value in tagged.items() if isinstance(value, str)}
        scalars = {tag: value for tag, value in tagged.items() if tag not in texts and np.ndim(value) == 0}
        lists = {tag: value for tag, value in tagged.items() if tag not in texts and tag not in scalars}
        self._all.write_scalars(step, scalars)
        self._rows.write_texts(step, texts)
        self._rows.write_summaries(step, lists)
        self._rows.end_row()

    def flush(self) -> None:
        """Returns when every row is on the disk, so that a checkpoint saved next has its rows."""
        self._all.flush()

    def close(self) -> None:
        self._all.close()


class JsonLinesWriter(metric_writers.MetricWriter):
    """A CLU metric writer of JSON rows `{"step": 20, "split": "train", "loss": 1.93}` from tags such as `train/loss`.

    What is written for one step and split, call after call, makes one row. JSON has no word for a number that is not
    finite: it is written as null, and said in the row's `non_finite`: `{"loss": "nan"}`.
    """

    def __init__(self, path: Path):
        self._file = open(path, "a", encoding="utf-8")
        self._row: dict[str, Any] = {}

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        for tag, value in scalars.items():
            row, name = self._row_of(step, tag)
            number = np.asarray(value).item()
            if isinstance(number, float) and not math.isfinite(number):
                row.setdefault("non_finite", {})[name] = str(number)
                number = None
            row[name] = number

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for tag, text in texts.items():
            row, name = self._row_of(step, tag)
            row[name] = text

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
        """Lists and arrays, such as a number a class; a None in a list is written as null: it is not known."""
        for tag, value in values.items():
            row, name = self._row_of(step, tag)
            numbers = np.array(value, object)
            finite = [number is None or math.isfinite(number) for number in numbers.flat]
            if not all(finite):
                row.setdefault("non_finite", {})[name] = str(numbers.tolist())
                numbers[~np.reshape(finite, numbers.shape)] = None
            row[name] = numbers.tolist()

    def end_row(self) -> None:
        """Hands the row to the operating system: it outlives a kill of this process."""
        if self._row:
            self._file.write(json.dumps(self._row, allow_nan=False) + "\n")
            self._file.flush()
            self._row = {}

    def flush(self) -> None:
        """Returns when every row is on the disk."""
        self.end_row()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()

    def _row_of(self, step: int, tag: str) -> tuple[dict[str, Any], str]:
        split, _, name = tag.rpartition("/")
        if (self._row.get("step"), self._row.get("split")) != (step, split):
            self.end_row()
            self._row = {"step": step, "split": split}
        return self._row, name

    def _refuse(self, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError(f"only numbers, texts and lists are written to {ROWS}")

    write_images = write_videos = write_audios = write_histograms = write_hparams = _refuse


class StepProfile(periodic_actions.PeriodicAction):
    """Traces a few steps into `workdir/profile`, for TensorBoard or Perfetto; called with a step once it is done.

    To be called after the steps of `edges`, when all that was dispatched has been waited for; other steps do nothing.

    CLU's own `Profile` logs an error and goes on, and loses the trace of a run that ends before it; hence this one.
    A run that resumes past `start_step` traces nothing.
    """

    def __init__(self, workdir: Path, start_step: int, steps: int):
        self.edges = {start_step, start_step + steps}  # the steps after which the trace begins and ends
        super().__init__(on_steps=self.edges)
        self._directory = str(workdir / "profile")
        self._start_step = start_step
        self._tracing = False

    def _apply(self, step: int, t: float) -> None:
        if step == self._start_step:
            jax.profiler.start_trace(self._directory)
            self._tracing = True
        else:
            self.close()

    def close(self) -> None:
        """Ends a trace that is under way; the last step must have been waited for, or the trace lacks it."""
        if self._tracing:
            jax.profiler.stop_trace()
            _log.info("the profile is in %s", self._directory)
            self._tracing = False


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run, in order; none where there is no file. A last line that is being written is not a row yet."""
    return [row for _, row in _lines(workdir / ROWS)]


def _cut(path: Path, last_step: int | None) -> None:
    """Leaves the rows up to `last_step`, and whole ones only."""
    if path.exists():
        kept = [line for line, row in _lines(path) if last_step is not None and row["step"] <= last_step]
        write_atomically(path, "".join(kept))


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each whole line and the row that it holds. Raises `ConfigError` for a line that is no row."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break  # the torn last line of a run that was killed in the middle of it
        try:
            rows.append((line, json.loads(line)))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number}: not a JSON row ({error.msg}); mend the line or remove it") from error
    return rows

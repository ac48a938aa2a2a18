"""The measurements of a run: rows of `metrics.jsonl`, TensorBoard's event files, and a profile on request.

The file holds one row for each step and split, in the order of writing. After a resume it reads as if the run had never
been interrupted: rows past the step that the run resumes from are removed before the first new row.
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

from vit_dist.run.clu_writers import SummaryWriter, metric_writers, periodic_actions
from vit_dist.run.files import NUMBER, TEXT, WHOLE, read_json_lines, write_atomically

ROWS = "metrics.jsonl"
_ROW = {
    "step": WHOLE, "split": TEXT, "count?": WHOLE, "loss?": NUMBER, "top1?": NUMBER, "top5?": NUMBER,
}  # fmt: skip
_log = logging.getLogger(__name__)


class MetricLog:
    """The rows and event files of one run. Only process 0 makes one."""

    def __init__(self, workdir: Path, *, resume_step: int | None):
        """Keeps the rows of earlier sessions up to `resume_step`; None: no row."""
        file = workdir / ROWS
        kept = [line for line, row in _lines(file) if resume_step is not None and row["step"] <= resume_step]
        write_atomically(file, "".join(kept))
        self._rows = JsonLinesWriter(file)
        events = SummaryWriter(
            workdir / "tensorboard",
            purge_step=0 if resume_step is None else resume_step + 1,
            filename_suffix=f".{time.time_ns()}",
        )
        self._all = metric_writers.MultiWriter([events, self._rows])

    def write(self, step: int, split: str, values: Mapping[str, float | int | str | list | None]) -> None:
        """Writes one row.

        Args:
          step: the number of the step.
          split: the split that the values are of.
          values: by name, which holds no `/`. Numbers also go to TensorBoard, as `split/name`; texts, lists and arrays
            only to the row. A None is left out: the value is unknown.
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
        """Waits until every row is on the disk, so that the next checkpoint has its rows."""
        self._all.flush()

    def close(self) -> None:
        self._all.close()


class JsonLinesWriter(metric_writers.MetricWriter):
    """A CLU metric writer of JSON rows `{"step": 20, "split": "train", "loss": 1.93}` from tags such as `train/loss`.

    Consecutive writes for one step and split make one row. JSON cannot express a number that is not finite: it is
    written as null, and named in the row's `non_finite`: `{"loss": "nan"}`.
    """

    def __init__(self, path: Path):
        self._file = open(path, "a", encoding="utf-8")
        self._row: dict[str, Any] = {}

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        self.write_summaries(step, {tag: np.asarray(value).item() for tag, value in scalars.items()})

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for tag, text in texts.items():
            row, name = self._row_of(step, tag)
            row[name] = text

    def write_summaries(self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
        """Writes numbers, lists and arrays, such as a number for each class; a None (unknown) becomes null."""
        for tag, value in values.items():
            row, name = self._row_of(step, tag)
            numbers = np.array(value, object)
            finite = [number is None or math.isfinite(number) for number in numbers.flat]
            if not all(finite):
                row.setdefault("non_finite", {})[name] = str(numbers.tolist())
                numbers[~np.reshape(finite, numbers.shape)] = None
            row[name] = numbers.tolist()

    def end_row(self) -> None:
        """Passes the row to the operating system, so that it survives a kill of this process."""
        if self._row:
            self._file.write(json.dumps(self._row, allow_nan=False) + "\n")
            self._file.flush()
            self._row = {}

    def flush(self) -> None:
        """Waits until every row is on the disk."""
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
    """Traces a few steps into `workdir/profile`, for TensorBoard or Perfetto.

    The loop calls it with a step of `edges` after that step has finished on the devices; other steps have no effect. A
    run that resumes past `start_step` traces nothing.

    CLU's own `Profile` only logs errors, and loses the trace of a run that ends inside it.
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
        """Ends the trace, if one is under way; it lacks steps that have not finished on the devices."""
        if self._tracing:
            jax.profiler.stop_trace()
            _log.info("the profile is in %s", self._directory)
            self._tracing = False


def read_rows(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of a run in order, none if there is no file; ignores a last line that is incomplete."""
    return [row for _, row in _lines(workdir / ROWS)]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Returns each complete line and its row; a run may have been killed while it wrote the last."""
    return read_json_lines(path, _ROW, cut=True)


def last_evaluation(workdir: Path, splits: tuple[str, ...]) -> dict[str, Any]:
    """Returns the last evaluation's row of an earlier session; empty where nothing was evaluated."""
    names = [row_name(split) for split in splits[:1]]
    rows = [row for row in read_rows(workdir) if row["split"] in (*names, *(f"{name}/ema" for name in names))]
    return max(rows, key=lambda row: (row["step"], row["split"]), default={})


def row_name(split: str) -> str:
    """Returns the name of an evaluation's rows: its split, but not `train`, which names the rows of training steps."""
    return "train/evaluated" if split == "train" else split

"""Exact evaluation: every example of a split counts once, on any mesh and with any batch size."""

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_dist import config
from vit_dist.data.sets.examples import Source, check_labels, distinct_names
from vit_dist.data.sets.sources import open_source
from vit_dist.data.stream.bad_examples import BadExample, check_bad, check_none_bad
from vit_dist.data.stream.loader import evaluation_batches
from vit_dist.data.stream.pixels import augments_on_device
from vit_dist.job import preemption, processes
from vit_dist.mesh.feed import Prefetch
from vit_dist.paths import expanded
from vit_dist.program import Program, restored
from vit_dist.recipes import Overrides
from vit_dist.run.checkpoints import Step
from vit_dist.run.failures import gather_bad_examples
from vit_dist.run.workdir import read_config
from vit_dist.step.evaluation import zero_totals
from vit_dist.step.state import Parameters

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of an evaluation over all processes. `bad` are examples that did not decode and are not counted."""

    count: int
    loss: float  # mean over the examples, without label smoothing
    top1: float
    top5: float
    class_top1: dict[str, float | None]  # by `distinct_names`; None for a class of no examples
    bad: tuple[BadExample, ...] = ()

    def row(self) -> dict[str, Any]:
        """Returns the values of a row of `metrics.jsonl`; `class_top1` is in the order of the classes."""
        values: dict[str, Any] = {"count": self.count, "loss": self.loss, "top1": self.top1, "top5": self.top5}
        values["class_top1"] = list(self.class_top1.values())
        return values | ({"skipped": len(self.bad)} if self.bad else {})


def evaluate_source(program: Program, parameters: Parameters, source: Source) -> Result:
    """Evaluates parameters on every example of a source. The mesh must be in use.

    Raises:
      TooManyBadExamples: on all processes, for files that do not decode, unless they may be skipped.
      StopEvaluation: on all processes, if a run that evaluates is asked to stop.
      RuntimeError: where the examples counted and skipped are not all examples.
    """
    settings = program.settings
    batch_size = program.evaluation_batch_size()
    batches = evaluation_batches(
        source,
        settings.data,
        image_size=program.image_size(),
        channels=settings.model.channels,
        batch_size=batch_size,
        rows=program.local_rows(batch_size),
    )
    totals = zero_totals(program.shape.classes)
    device_batches = Prefetch(batches, program.mesh, batch_size, settings.data.prefetch)
    with contextlib.closing(batches), contextlib.closing(device_batches):
        for number, batch in enumerate(device_batches):
            processes.alive()
            preemption.check_between_batches()
            if number == 0:
                processes.compile_together(program.evaluation_step, parameters, batch, totals)
            totals = program.evaluation_step(parameters, batch, totals)
        sums: dict[str, np.ndarray] = jax.device_get(totals)
    count = int(sums["count"])
    bad = gather_bad_examples(batches.bad())
    if settings.data.on_bad == "error":
        check_none_bad(bad)
    if count + len(bad) != len(source):
        raise RuntimeError(f"evaluation counted {count} examples of {len(source)}, and skipped {len(bad)}")
    class_sums = zip(distinct_names(source.class_names), sums["class_top1"], sums["class_count"], strict=False)
    return Result(
        count=count,
        loss=float(sums["loss"]) / max(count, 1),
        top1=int(sums["top1"]) / max(count, 1),
        top5=int(sums["top5"]) / max(count, 1),
        class_top1={name: float(correct / examples) if examples else None for name, correct, examples in class_sums},
        bad=tuple(bad),
    )


def open_split(settings: config.Config, split: str) -> Source:
    """Opens a split of the config's data. Raises `ConfigError`, also for more classes than the model has."""
    source = open_source(settings.data, split, settings.model.channels)
    check_labels(source, settings.model.num_classes or len(source.class_names))
    return source


def evaluate(
    workdir: str | Path,
    *,
    split: str = "test",
    step: Step = "newest",
    overrides: Overrides = (),
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run.

    Args:
      workdir: the directory of the run.
      split: which split of its data.
      step: which checkpoint.
      overrides: changes of its config that leave the run the same, such as {"mesh.data": 4}.

    Returns:
      split, step, count, loss, top1, top5 and class_top1. Where the run keeps a moving average of the parameters these
      are the average's, and `parameters` holds the same of the parameters themselves.

    Raises:
      ConfigError: where there is no such run, checkpoint or split.
    """
    workdir = expanded(workdir, "workdir")
    settings = read_config(workdir, overrides)
    processes.start(settings.fake_devices, settings.deadlines, workdir=workdir)
    source = open_split(settings, split)
    on_device = augments_on_device(source, settings.data)
    run = restored(workdir, settings, augment_on_device=on_device, step=step)
    with run as (program, restored_step, trees):
        results = {name: evaluate_source(program, tree, source) for name, tree in trees.items()}
        bad = results["parameters"].bad
        for example in bad:
            _log.warning("%s: skipped %s: %s", split, example.name, example.reason)
        check_bad(bad, settings.data.max_bad_fraction, len(source))
    answer = {"split": split, "step": restored_step, **_answer(results.get("ema") or results["parameters"])}
    return answer | ({"parameters": _answer(results["parameters"])} if "ema" in results else {})


def _answer(result: Result) -> dict[str, Any]:
    return {**result.row(), "class_top1": result.class_top1}

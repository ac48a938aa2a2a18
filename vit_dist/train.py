"""Training: build, restore, step, log, evaluate, save.

The loop dispatches a step and goes on; what a step measured is read one step late, so the devices never wait for
Python. Rows are on the disk before the checkpoint of their step is, so that a run that is killed and started again
cuts the rows past its checkpoint and writes them anew, none doubled and none missing.
"""

import dataclasses
import hashlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_dist import config
from vit_dist.config import Config
from vit_dist.data.loader import train_batches
from vit_dist.data.sources import ArraySource, Source, fingerprint
from vit_dist.describe import parameter_table
from vit_dist.evaluate import evaluate_source, open_split
from vit_dist.mesh import processes
from vit_dist.mesh.feed import Prefetch
from vit_dist.program import Program
from vit_dist.run import curves, environment
from vit_dist.run import workdir as run_files
from vit_dist.run.checkpoints import Checkpoints
from vit_dist.run.devices import memory_in_use
from vit_dist.run.metrics import MetricLog, profile_action, read_rows
from vit_dist.run.progress import Progress
from vit_dist.run.signals import StopRequest
from vit_dist.step.state import State

_log = logging.getLogger(__name__)


class Preempted(Exception):
    """The run was asked to stop, and has saved everything."""


class Diverged(Exception):
    """The loss is not a number any more."""


def train(settings: Config, workdir: str | Path) -> dict[str, Any]:
    """Trains into `workdir`, going on from where it stands if it holds this run.

    Returns the summary: step, count, loss, top1 (of the last evaluation of the first split; None without one),
    seconds (of training, over all sessions), workdir. Raises `ConfigError` before anything is written, `Preempted`
    after a SIGTERM and a complete save, `Diverged` for a loss that is not finite.
    """
    workdir = Path(workdir)
    processes.start(settings.fake_devices)
    source = open_split(settings, "train")
    splits = {name: open_split(settings, name) for name in settings.evaluate.splits if settings.evaluate.every_steps}
    steps = config.total_steps(settings, len(source))
    program = Program(
        settings,
        classes=len(source.class_names),
        steps=steps,
        crop_on_device=isinstance(source, ArraySource),
    )
    if run_files.holds_run(workdir):
        run_files.check_same_run(workdir, run_files.read_config(workdir), program.settings)
        done = run_files.summary(workdir)
        if done is not None and done["step"] >= steps:
            return done
    with program.in_use(), Session(program, workdir, source, splits) as session:
        return session.run()


class Session:
    """One process's part in one stretch of a run, from start or resume to end or preemption."""

    def __init__(self, program: Program, workdir: Path, source: Source, splits: dict[str, Source]):
        self.program, self.settings, self.workdir = program, program.settings, workdir
        self.source, self.splits = source, splits
        self.writes = jax.process_index() == 0

    def __enter__(self) -> "Session":
        checkpoint = self.settings.checkpoint
        self.program.abstract_state()  # refuses an optimizer rule that matches nothing, before anything is written
        if self.writes:
            run_files.write_run(self.workdir, self.settings, self.source.class_names)
            prints = {name: fingerprint(one) for name, one in {"train": self.source, **self.splits}.items()}
            environment.write(self.workdir, environment.describe(self.program.mesh, prints))
        self.checkpoints = Checkpoints(
            self.workdir / "checkpoints", keep_last=checkpoint.keep_last, keep_best=checkpoint.keep_best
        )
        self.state, self.seconds_before = self._restore()
        self.step = int(self.state.step)
        self.log = MetricLog(self.workdir, resume_step=self.step) if self.writes else None
        self.progress = Progress(self.program.steps, self.step) if self.writes else None
        profile = self.settings.profile
        self.profile = profile_action(self.workdir, profile.start_step, profile.steps) if profile.steps else None
        self.started = time.perf_counter()
        self.measured: tuple[int, float] | None = None  # the step last evaluated, and its top-1
        self.pending: Pending | None = None
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if self.profile is not None:
            self.profile.close()
        if self.progress is not None:
            self.progress.close()
        if self.log is not None:
            self.log.close()
        self.checkpoints.close()

    def run(self) -> dict[str, Any]:
        """Steps until the end; see `train`."""
        settings, program = self.settings, self.program
        self._say_what_runs()
        host = train_batches(
            self.source,
            settings.data,
            image_size=program.image_size(),
            channels=settings.model.channels,
            seed=settings.seed,
            batch_size=settings.batch_size,
            rows=program.local_rows(settings.batch_size),
            start_step=self.step,
            stop_step=program.steps,
        )
        batches = Prefetch(host, program.mesh, settings.batch_size, settings.data.prefetch)
        window = Window(self.step, batches)
        first = self.step + 1
        try:
            with StopRequest() as stop:
                for batch in batches:
                    self.state, metrics = program.train_step(self.state, batch)
                    self.step += 1
                    self._write_pending()
                    last = self.step == program.steps
                    if last or self.step % settings.log_every == 0:
                        self.pending = Pending(self.step, metrics, window)
                    if self.step == first:
                        jax.block_until_ready(metrics)
                        _log.info("first step, with its compilation: %.1f s", window.seconds())
                        window.restart(self.step)
                        if self.progress is not None:
                            self.progress.update(self.step)  # the time left is reckoned from here
                    if self.profile is not None:
                        self.profile(self.step)
                    stopping = stop.requested(self.step)
                    evaluating = _due(settings.evaluate.every_steps, self.step, last)
                    saving = stopping or last or _due(settings.checkpoint.every_steps, self.step, last)
                    if evaluating or saving:
                        self._write_pending()
                        if evaluating:
                            self._evaluate()
                        if saving:
                            self._save()
                        window.restart(self.step)
                    if stopping and not last:
                        self.checkpoints.wait()
                        raise Preempted(f"saved step {self.step} of {program.steps} in {self.workdir}")
        finally:
            batches.close()
            host.close()
        return self._finish()

    def _restore(self) -> tuple[State, float]:
        latest = self.checkpoints.latest()
        if latest is None:
            return self.program.new_state(), 0.0
        _, trees = self.checkpoints.restore(_trees(self.program.abstract_state()), latest)
        seconds = float(self.checkpoints.metadata(latest)["seconds"])
        return State(**{"ema": None, **trees}), seconds

    def _save(self) -> None:
        if self.log is not None:
            self.log.flush()
        metrics = {"top1": self.measured[1]} if self.measured and self.measured[0] == self.step else None
        self.checkpoints.save(self.step, _trees(self.state), metrics=metrics, metadata={"seconds": self._seconds()})

    def _evaluate(self) -> None:
        """Evaluates every split on the parameters and on their average; the first split's is the run's result."""
        for number, (split, source) in enumerate(self.splits.items()):
            result = evaluate_source(self.program, self.state.parameters, source)
            self._write(self.step, split, result.row())
            if self.state.ema is not None:
                result = evaluate_source(self.program, self.state.ema, source)
                self._write(self.step, f"{split}/ema", result.row())
            if number == 0:
                self.measured = (self.step, result.top1)
        if self.log is not None:
            self.log.flush()
            curves.draw(self.workdir)

    def _write_pending(self) -> None:
        """Reads and writes the metrics of the last logged step, which the devices have finished by now."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        values = pending.read(self.program)
        self._write(pending.step, "train", values)
        if self.progress is not None:
            shown = {"loss": values["loss"], "lr": values["learning_rate"], "img/s": values["images_per_second"]}
            self.progress.update(pending.step, shown)
        if not math.isfinite(values["loss"]):
            raise Diverged(f"the loss is {values['loss']} at step {pending.step}; lower optimizer.learning_rate?")

    def _write(self, step: int, split: str, values: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(step, split, values)
        if self.progress is not None and split != "train":
            self.progress.line(f"{split} at step {step}: top1 {values['top1']:.4f}  loss {values['loss']:.4f}")

    def _finish(self) -> dict[str, Any]:
        self.checkpoints.wait()
        if self.log is not None:
            self.log.flush()
        wanted = [f"{split}{of}" for split in list(self.splits)[:1] for of in ("/ema", "")]
        rows = [row for split in wanted for row in read_rows(self.workdir) if row["split"] == split]
        result = max(rows, key=lambda row: row["step"], default={})
        summary = {
            "step": self.step,
            **{name: result.get(name) for name in ("count", "loss", "top1")},
            "seconds": round(self._seconds(), 1),
            "workdir": str(self.workdir),
        }
        if self.writes:
            curves.draw(self.workdir)
            run_files.write_summary(self.workdir, summary)
        return summary

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _say_what_runs(self) -> None:
        """The parameters, and what runs where, for whoever reads the log."""
        if self.progress is None:
            return
        program, mesh = self.program, self.program.mesh
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            self.progress.line(parameter_table(program.abstract_state().parameters))
        axes = " x ".join(f"{name}={size}" for name, size in mesh.shape.items())
        device = mesh.devices.flat[0]
        self.progress.line(
            f"mesh {axes} of {mesh.size} {device.device_kind} devices, {jax.process_count()} process(es)"
        )
        self.progress.line(f"{len(self.source):,} examples, {program.steps:,} steps of {self.settings.batch_size}")
        if self.step:
            self.progress.line(f"going on from step {self.step}")


class Window:
    """The stretch of steps that a row's rates are of. It begins anew after a compilation, evaluation or save."""

    def __init__(self, step: int, batches: Prefetch):
        self._batches = batches
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._begun, self._batches.waited = step, time.perf_counter(), 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def rates(self, step: int) -> tuple[float, float]:
        """(seconds a step, share of them spent waiting for data) up to `step`, where the next stretch begins."""
        seconds, waited = self.seconds(), self._batches.waited
        count = step - self._step
        self.restart(step)
        return seconds / max(count, 1), waited / seconds


@dataclasses.dataclass
class Pending:
    """What a logged step measured, still on the devices."""

    step: int
    metrics: dict[str, jax.Array]
    window: Window

    def read(self, program: Program) -> dict[str, Any]:
        """Waits for the step and returns its row."""
        values: dict[str, Any] = dict(jax.device_get(self.metrics))
        ids = values.pop("ids", None)
        row: dict[str, Any] = {name: float(value) for name, value in values.items()}
        step_seconds, waiting = self.window.rates(self.step)
        rate = program.settings.batch_size / step_seconds
        row |= {
            "images_per_second": rate,
            "images_per_second_per_device": rate / program.mesh.size,
            "step_ms": step_seconds * 1000,
            "data_wait_fraction": waiting,
            "mfu": program.mfu(step_seconds),
            "memory_bytes": memory_in_use(program.mesh.devices.flat),
        }
        if ids is not None:
            row["examples"] = hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()[:16]
        return row


def _due(every: int, step: int, last: bool) -> bool:
    """Whether what is done `every` so many steps (0: never), and at the end, is due after `step`."""
    return bool(every) and (last or step % every == 0)


def _trees(state: State) -> dict[str, Any]:
    """The state as the named trees of a checkpoint; an average that is not kept has none."""
    names = [field.name for field in dataclasses.fields(State)]
    return {name: getattr(state, name) for name in names if getattr(state, name) is not None}

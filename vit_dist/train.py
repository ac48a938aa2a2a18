"""Training: build, restore, step, log, evaluate, save.

The loop dispatches a step while the previous one runs, and reads the metrics of a step one step later, so the devices
never wait for Python. Rows are on the disk before the checkpoint of their step. A run that is killed and started again
deletes the rows after its checkpoint and writes them again, so that none is doubled and none is missing.
"""

import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from vit_dist.config import ConfigError
from vit_dist.data.sets.examples import Source, fingerprint
from vit_dist.data.stream.bad_examples import BadExample, TooManyBadExamples
from vit_dist.data.stream.loader import Batches
from vit_dist.data.stream.pixels import augments_on_device
from vit_dist.describe import run_lines
from vit_dist.evaluate import evaluate_source, open_split
from vit_dist.initial import open_weights, record, started, weights_fingerprint, with_traits
from vit_dist.job import processes
from vit_dist.job.preemption import StopEvaluation, StopRequest
from vit_dist.lengths import in_steps
from vit_dist.mesh.feed import Prefetch
from vit_dist.paths import expanded
from vit_dist.plan.attached import plan_lines
from vit_dist.probes.measure import Probes, of_run
from vit_dist.program import Program
from vit_dist.rates import Pending, Window
from vit_dist.recipes import Overrides, Recipe, load_config
from vit_dist.run import curves, environment
from vit_dist.run import workdir as run_files
from vit_dist.run.checkpoints import Checkpoints
from vit_dist.run.failures import BadExampleList
from vit_dist.run.falling_back import restore_newest_whole
from vit_dist.run.lock import Lock, locked, refuse_second
from vit_dist.run.metrics import MetricLog, StepProfile, last_evaluation, row_name
from vit_dist.run.progress import Progress
from vit_dist.step.state import State
from vit_dist.weights.adapted import Adapted, adapted
from vit_dist.weights.published import Published

_log = logging.getLogger(__name__)


class Preempted(Exception):
    """The run was asked to stop by SIGTERM, and has saved everything."""


class Interrupted(KeyboardInterrupt):
    """The user stopped the run by Ctrl-C, and it has saved everything."""


class Diverged(Exception):
    """The loss or the parameters are not numbers any more."""


def train(
    config: Recipe, workdir: str | Path, overrides: Overrides = (), *, own_process: bool = False
) -> dict[str, Any]:
    """Trains into `workdir`, and resumes there if it holds this run.

    Args:
      config: a recipe's name or file, or a config; see `load_config`.
      workdir: where the run is kept.
      overrides: changes of the config, such as {"batch_size": 64}.
      own_process: whether this process does nothing else, so that a second Ctrl-C may end it; see `StopRequest`.

    Returns:
      The summary: step, count, loss, top1 (of the last evaluation of the first split; None without one), seconds (of
      training, over all sessions), workdir.

    Raises:
      ConfigError: before anything is written.
      Preempted: after a SIGTERM and a complete save.
      Interrupted: after a Ctrl-C and a complete save; a second Ctrl-C does not wait for it, see `StopRequest`.
      Diverged: for a loss that is not finite; no such state is ever saved.
    """
    settings = load_config(config, overrides)
    workdir = expanded(workdir, "workdir")
    processes.start(settings.fake_devices, settings.deadlines, workdir=workdir)
    refuse_second(workdir, "--workdir")
    seen = run_files.look(workdir)
    saved_settings = run_files.read_config(workdir) if seen[0] is not None else None
    weights: Published | None = None
    if saved_settings is not None:
        settings = run_files.with_scan_of(saved_settings, run_files.with_weights_of(saved_settings, settings))
    elif settings.init.weights is not None:
        weights = open_weights(settings.init, settings.model)
        settings = with_traits(settings, weights)
    elif settings.init.freeze != "none" or settings.lora.rank:
        _log.warning("init.weights: not set, so that what init.freeze or lora keeps as it is are random numbers")
    source = open_split(settings, "train")
    settings = in_steps(settings, len(source))
    splits = {name: open_split(settings, name) for name in settings.evaluate.splits if settings.evaluate.every_steps}
    on_device = augments_on_device(source, settings.data)
    for name, evaluated in splits.items():
        if augments_on_device(evaluated, settings.data) != on_device:  # as where a mixture of pixels is tested on files
            raise ConfigError(
                f"evaluate.splits: of {name} and train one is image files and the other pixels in memory, but both "
                "must be augmented alike; set data.in_memory=true, or give both in the same format"
            )
    steps = settings.total_steps
    assert steps is not None
    program = Program(settings, classes=len(source.class_names), steps=steps, augment_on_device=on_device)
    program.check_training_batch()
    probes = of_run(program, source, splits)
    fingerprints = {name: fingerprint(each) for name, each in {"train": source, **splits}.items()}
    processes.check_same("the config and the data", repr((program.settings, fingerprints)))
    processes.check_same("init.weights", weights_fingerprint(weights))
    processes.alive()
    if saved_settings is not None:
        run_files.check_same_run(workdir, saved_settings, program.settings)
        environment.check_same_data(workdir, fingerprints)
        summary, saved = processes.gather([run_files.summary(workdir), run_files.checkpoint_steps(workdir)])[0]
        if saved[-1] > steps:
            raise ConfigError(
                f"total_steps: the run in {workdir} has done {saved[-1]} steps, more than the {steps} of this config; "
                "raise total_steps or total_epochs, or choose another --workdir"
            )
        if summary is not None and summary["step"] == steps:
            return summary
    head, model = settings.init.head, program.settings.model
    start = adapted(weights, model, head, source.class_names) if weights else None
    with contextlib.ExitStack() as stack, program.in_use():
        batches = {"batch_size": program.settings.batch_size, "evaluate.batch_size": program.evaluation_batch_size()}
        program.check_memory(program.abstract_state(), batches)  # which also refuses a rule that matches nothing
        lock = stack.enter_context(locked(workdir, settings.deadlines.peer_seconds, "--workdir"))
        run_files.check_unchanged(workdir, seen)
        if jax.process_index() == 0:
            run_files.write_run(workdir, program.settings, source.class_names)
            origin = record(settings.init, weights) if weights else None
            environment.write(workdir, environment.describe(program.mesh, fingerprints, origin))
        run_files.check_shared(workdir)
        with contextlib.ExitStack() as stops, contextlib.ExitStack() as opened:
            session = Session(program, workdir, source, splits, opened, start, probes, lock)
            try:
                return session.run(StopRequest(own_process=own_process), stops)
            except (TooManyBadExamples, Diverged):  # on all processes alike, after the next step was dispatched
                # A process that ends in the middle of a step leaves half a collective, and gloo then aborts the others.
                jax.block_until_ready(session.state.parameters)
                raise


class Session:
    """One process's work from the start of a run, or its resume, to its end or preemption."""

    def __init__(
        self,
        program: Program,
        workdir: Path,
        source: Source,
        splits: dict[str, Source],
        opened: contextlib.ExitStack,
        start: Adapted | None,
        probes: Probes | None,
        lock: Lock | None,
    ):
        """Restores the newest checkpoint or makes a new state, of `start`; `opened` closes files and progress bar."""
        self.lock = lock  # of the workdir, on process 0
        self.program, self.settings, self.workdir = program, program.settings, workdir
        self.source, self.splits, self.probes = source, splits, probes
        keep, profile = self.settings.checkpoint, self.settings.profile
        best = keep.keep_best if splits else 0
        self.checkpoints = Checkpoints(
            workdir / "checkpoints", keep_last=keep.keep_last, keep_best=best, verify=keep.verify, retries=keep.retries
        )
        opened.enter_context(contextlib.closing(self.checkpoints))
        self.state, self.seconds_before = self._restore(start)
        self.checkpoints.open()
        self.step = self.resumed_step = int(self.state.step)
        self.bad_examples = BadExampleList(workdir, resume_step=self.step)
        self.log: MetricLog | None = None
        self.progress: Progress | None = None
        self.profile: StepProfile | None = None
        if jax.process_index() == 0:  # it alone writes
            self.log = opened.enter_context(contextlib.closing(MetricLog(workdir, resume_step=self.step)))
            self.progress = opened.enter_context(contextlib.closing(Progress(program.steps, self.step)))
            if profile.steps:
                trace = StepProfile(workdir, profile.start_step, profile.steps)
                self.profile = opened.enter_context(contextlib.closing(trace))
        self.result: dict[str, Any] | None = None  # the row that the summary and the best checkpoint go by
        self.pending: Pending | None = None
        self.host_batches: Batches | None = None
        self.started = time.perf_counter()
        opened.callback(processes.stop_clock)

    def run(self, stop: StopRequest, stops: contextlib.ExitStack) -> dict[str, Any]:
        """Steps until the end; see `train`. Signals go to `stop` from the first step on, until `stops` is closed."""
        settings, program = self.settings, self.program
        if self.progress is not None:
            for line in run_lines(program, self.state, self.source, self.splits):
                self.progress.line(line)
        due = self.step > 0 and _due(settings.evaluate.every_steps, self.step, last=False)
        if due and self._last_result().get("step") != self.step:  # the session before was asked to stop instead
            self._evaluate()
        self.host_batches = host_batches = program.training_batches(self.source, self.step, program.steps)
        batches = Prefetch(host_batches, program.mesh, settings.batch_size, settings.data.prefetch)
        window = Window(self.step, host_batches, batches)
        first_step, previous = self.step + 1, None
        with contextlib.closing(host_batches), contextlib.closing(batches):
            for batch in batches:
                processes.alive(self.step + 1)
                if self.step == self.resumed_step:
                    processes.compile_together(program.train_step, self.state, batch)
                    if self.progress is not None:
                        for line in plan_lines(program, self.state, batch):
                            self.progress.line(line)
                self.state, metrics = program.train_step(self.state, batch)
                if self.step == self.resumed_step:
                    stops.enter_context(stop)
                self.step += 1
                jax.block_until_ready(previous)  # two dispatched steps are enough, and a stop request is handled soon
                previous = metrics
                self._write_pending()
                last = self.step == program.steps
                if self.step == first_step:
                    jax.block_until_ready(metrics)
                    _log.info("first step, with its compilation: %.1f s", window.seconds())
                    window.restart(self.step)
                    if self.progress is not None:
                        self.progress.update(self.step)  # the time left is estimated from here
                if last or self.step % settings.log_every == 0:
                    self.pending = Pending(self.step, metrics, window)
                if self.profile is not None and self.step in self.profile.edges:
                    jax.block_until_ready(metrics)  # so that a trace holds whole steps
                    self.profile(self.step)
                stopping = stop.requested()
                evaluating = not stopping and _due(settings.evaluate.every_steps, self.step, last)
                saving = stopping or last or _due(settings.checkpoint.every_steps, self.step, last)
                if evaluating or saving:
                    self._write_pending()
                    self._check_finite(self.step, jax.device_get(metrics))
                    if evaluating:
                        try:
                            self._evaluate()
                        except StopEvaluation:
                            evaluating, stopping = False, True
                        except TooManyBadExamples:  # the training so far is not lost
                            self._save()
                            self.checkpoints.wait()
                            raise
                    if saving or stopping or (evaluating and self._is_one_of_the_best()):
                        self._save()
                    if evaluating:
                        self._draw()  # after the checkpoint, which must not be lost
                    window.restart(self.step)
                if stopping and (self.splits or not last):
                    self.checkpoints.wait()
                    raise self._stopped(stop)
        try:
            return self._finish()
        except StopEvaluation:
            raise self._stopped(stop) from None

    def _stopped(self, stop: StopRequest) -> Exception | KeyboardInterrupt:
        stopped = Interrupted if stop.by_user() else Preempted
        return stopped(f"saved step {self.step} of {self.program.steps} in {self.workdir}")

    def _restore(self, start: Adapted | None) -> tuple[State, float]:
        found = restore_newest_whole(self.checkpoints, _trees(self.program.abstract_state()))
        if found is None:
            state = self.program.new_state()
            return state if start is None else started(state, start, self.program.mesh), 0.0
        run_files.check_shared(self.workdir)  # a step may have been set aside
        return State(**{"ema": None, **found.trees}), float(found.metadata.get("seconds", 0))

    def _save(self) -> None:
        """Begins to save this step; rows up to it are on the disk first."""
        if self.lock is not None:
            self.lock.check()
        if self.log is not None:
            self.log.flush()
        if self.progress is not None:
            self.progress.line(f"saving step {self.step} to {self.workdir / 'checkpoints'}")
        metadata = {"seconds": self._seconds()}
        self.checkpoints.save(self.step, _trees(self.state), metrics=self._measured(), metadata=metadata)

    def _is_one_of_the_best(self) -> bool:
        """Whether to save this step as one of the best. Process 0 decides, so that all processes save together."""
        return processes.gather(self.checkpoints.would_keep(self._measured()))[0]

    def _measured(self) -> dict[str, float] | None:
        """Returns the metric that the best checkpoint goes by; None where this step was not evaluated."""
        if self.result is None or self.result["step"] != self.step:
            return None
        return {"top1": self.result["top1"]}

    def _evaluate(self) -> None:
        """Evaluates every split on the parameters and on their average; the first split's is the run's result.

        Probes are of the features of the average, where there is one.
        """
        found = list[tuple[str, dict[str, Any]]]()
        bad = list[tuple[str, Sequence[BadExample], Source]]()
        for split, source in self.splits.items():
            name, result = row_name(split), evaluate_source(self.program, self.state.parameters, source)
            bad.append((split, result.bad, source))
            found.append((name, result.row()))
            if self.state.ema is not None:
                found.append((f"{name}/ema", evaluate_source(self.program, self.state.ema, source).row()))
        if self.probes is not None:
            averaged = self.state.parameters if self.state.ema is None else self.state.ema
            sources = {"train": self.source, **self.splits}
            measured = self.probes.measure(
                averaged, self.splits, lambda split, skipped: bad.append((split, skipped, sources[split]))
            )
            found += measured.items()
        for each in bad:
            self._note_bad(self.step, *each)
        for name, row in found:  # all or none, for a session that resumes after a stop
            self._write(name, row)
        self.result = {"step": self.step, **found[0 if self.state.ema is None else 1][1]}

    def _draw(self) -> None:
        if self.log is not None:
            self.log.flush()
            curves.draw(self.workdir)

    def _write(self, name: str, row: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(self.step, name, row)
        if self.progress is not None:
            loss = f"  loss {row['loss']:.4f}" if "loss" in row else ""
            self.progress.line(f"{name} at step {self.step}: top1 {row['top1']:.4f}{loss}")

    def _write_pending(self) -> None:
        """Writes the metrics of the last logged step, which the devices have finished by now."""
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        row = pending.read(self.program)
        assert self.host_batches is not None
        bad = self.host_batches.bad(pending.step - self.resumed_step)  # without the batches that were only read ahead
        skipped = self._note_bad(pending.step, "train", bad, self.source)
        row |= {"skipped": skipped} if skipped else {}
        if self.log is not None:
            self.log.write(pending.step, "train", row)
        if self.progress is not None:
            shown = ("loss", "learning_rate", "images_per_second")
            self.progress.update(pending.step, {name: row[name] for name in shown if name in row})
        self._check_finite(pending.step, row)

    def _check_finite(self, step: int, metrics: dict[str, Any]) -> None:
        wrong = {name: float(metrics[name]) for name in ("loss", "param_norm") if not math.isfinite(metrics[name])}
        if wrong:
            values = ", ".join(f"{name} is {value}" for name, value in wrong.items())
            saved = self.checkpoints.latest()
            last = "nothing was saved yet" if saved is None else f"the last checkpoint is of step {saved}"
            raise Diverged(f"step {step}: {values}; {last}; lower optimizer.learning_rate?")

    def _note_bad(self, step: int, split: str, bad: Sequence[BadExample], source: Source) -> int:
        """Lists the examples that any process skipped and returns their count; ends the run if they are too many."""
        data = self.settings.data
        if data.on_bad == "error":
            return 0
        skipped = self.bad_examples.note(step, split, bad)
        self.bad_examples.check(split, data.max_bad_fraction, len(source))
        return skipped

    def _finish(self) -> dict[str, Any]:
        self.checkpoints.wait()
        self.result = self.result or self._last_result()
        if self.splits and self.result.get("step") != self.step:  # it was trained to its end, but not evaluated
            self._evaluate()
        result = self.result
        summary = {
            "step": self.step,
            **{name: result.get(name) for name in ("count", "loss", "top1")},
            "seconds": round(self._seconds(), 1),
            "workdir": str(self.workdir),
        }
        if self.log is not None:
            self._draw()
            run_files.write_summary(self.workdir, summary)
        return summary

    def _last_result(self) -> dict[str, Any]:
        """Returns the last evaluation's row of an earlier session, on all processes; empty where there is none."""
        return processes.gather(last_evaluation(self.workdir, self.settings.evaluate.splits))[0]

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started


def _due(every: int, step: int, last: bool) -> bool:
    """Whether to do after `step` what is done every so many steps (0: never) and at the end."""
    return bool(every) and (last or step % every == 0)


def _trees(state: State) -> dict[str, Any]:
    """Returns the state as the named trees of a checkpoint, without `ema` where none is kept."""
    names = [field.name for field in dataclasses.fields(State)]
    return {name: getattr(state, name) for name in names if getattr(state, name) is not None}

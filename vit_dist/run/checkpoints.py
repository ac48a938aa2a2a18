"""Checkpoints of a run, saved while the training goes on (Orbax), and told apart from damaged ones when they are read.

A checkpoint is a few named trees of arrays, such as `parameters`, `ema` and `optimizer`, each saved under its own name,
so that evaluation reads the parameters and leaves the optimizer on the disk. `restore` takes the shapes, types and
shardings as `jax.ShapeDtypeStruct`s, which may be on another mesh than the one that saved. A checkpoint on the disk is
always complete: an interrupted save leaves only a temporary folder, which the next run that saves removes. What the
disk did to it afterwards is told by its record (`step_record`).
"""

import functools
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from vit_dist.config import ConfigError
from vit_dist.job import processes
from vit_dist.run import step_record, whole
from vit_dist.run.save_failures import ERRORS, WITHOUT_TRACEBACKS, SaveFailures, lack_of_space
from vit_dist.run.state_digests import Pending, StateDigests, described, tensors_of
from vit_dist.run.step_record import Damaged, Record
from vit_dist.weights.saved_tree import short_reason

Step = int | Literal["newest", "best"]  # which checkpoint of a run; the best is that of the highest top-1
Trees = Mapping[str, Any]  # name -> tree of arrays, or of jax.ShapeDtypeStructs

# If several devices hold copies of an array, Orbax lets each device write a slice of it, and compiles a function for
# each slice of each shape. For slices of fewer bytes, compiling takes longer than one device takes to write the array.
SMALLEST_SLICE = 2**18
LARGEST_IN_MEMORY = 2 << 30  # bytes of a tree
_TRIES = 5  # of a reader, whose step another process may delete meanwhile
_REMOVALS = 20  # tries, of what a save that failed has left; the next run removes the rest
_DELETION_SECONDS = 2  # in which a step that is being deleted is gone

_log = logging.getLogger(__name__)


class Checkpoints:
    """The steps saved in one directory. In a job of several processes, each calls every method.

    It keeps the newest `keep_last` steps, and also the `keep_best` steps with the highest `best_metric`; a NaN ranks
    below every number. It never deletes the newest step, and an old step only once the newer one is complete.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        best_metric: str = "top1",
        read_only: bool = False,
        verify: bool = True,
        retries: int = 3,
    ):
        """Opens `directory`, which `save` makes if it is missing.

        With `read_only` a missing one is a `ConfigError`, and nothing is written. Without `verify` a step is read as it
        is, damaged or not. After `retries` saves in a row that failed, the last of them is an error.
        """
        if read_only and not directory.is_dir():
            raise ConfigError(f"{directory}: no checkpoints here; give the workdir of a run that has saved one")
        self.directory, self._verify = directory, verify
        self._keep_last, self._keep_best, self._best_metric = keep_last, keep_best, best_metric
        self._opened = False
        self._failures = SaveFailures(directory, retries)
        self._digests = StateDigests()
        self._saving: tuple[int, Pending] | None = None

    @functools.cached_property
    def _checkpointer(self) -> Any:
        """Orbax's, which reads and deletes; only a run that saves has one."""
        policies = ocp.training.preservation_policies
        context = ocp.Context()
        context.array.saving.min_slice_bytes_for_replica_parallel = SMALLEST_SLICE
        # Orbax copies its context, and with it the object of a bound method, but not that of a function.
        context.async_options.post_finalization_callback = lambda: self._write_record()
        best = policies.BestN(get_metric_fn=self._score, n=self._keep_best, keep_checkpoints_without_metrics=False)
        self._opened = True
        logging.getLogger("absl").addFilter(WITHOUT_TRACEBACKS)
        return ocp.training.Checkpointer(
            self.directory.resolve(),
            context=context,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep_last), best]),
            cleanup_tmp_directories=True,
        )

    def open(self) -> None:
        """Makes the directory, and removes what interrupted saves have left in it; else the first save does so.

        In a job of several processes, all of them must see the same steps when they call it.
        """
        self._checkpointer  # noqa: B018  (Orbax does it when it is made)

    def save(
        self,
        step: int,
        state: Trees,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Begins to save, and returns once `state` is copied: the caller may then donate its buffers.

        Waits for the previous save. If that failed, or the disk has no room for this one, the log says so, and the run
        goes on with the steps that there are. Does nothing for a step that is already saved: a resumed run reaches it
        with the same state.

        Args:
          step: the number of the step.
          state: the trees to save, by name.
          metrics: the step's evaluation, which decides whether it is among the best; None: it was not evaluated.
          metadata: anything that JSON can hold.

        Raises:
          ConfigError: too many saves in a row failed.
        """
        checkpointer, steps = self._checkpointer, self.steps()
        if step in steps:
            return
        own = lack_of_space(self.directory, self._size(steps, state)) if processes.index() == 0 else None
        lack = processes.gather(own)[0]
        if lack is not None:
            self._failures.note(step, lack, max(steps, default=None))
            return
        self._saving = step, self._digests.start(state)
        try:
            checkpointer.save_checkpointables_async(
                step,
                dict(state),  # Orbax adds its own entries to the dict that it is given
                force=True,
                metrics=None if metrics is None else {name: float(value) for name, value in metrics.items()},
                custom_metadata={**(metadata or {}), step_record.MARK: True},
            )
        except ERRORS as error:
            self._settle(error)

    def _size(self, steps: list[int], state: Trees) -> int:
        """Returns the bytes that a save takes: those of the newest step, else, without compression, of the state."""
        if steps:
            return step_record.bytes_of(self.directory / str(steps[-1]))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(dict(state)))

    def _settle(self, error: Exception | None = None, *, log: bool = True) -> None:
        """Waits for the save under way, if there is one, and notes how it ended, on all processes alike.

        `error` is what beginning it raised; `log` is as for `SaveFailures.note`.
        """
        if self._saving is None:
            return
        step, _ = self._saving
        try:
            self._checkpointer.wait()
        except ERRORS as raised:
            error = raised
        self._saving = None
        reasons = [reason for reason in processes.gather(None if error is None else short_reason(error)) if reason]
        if reasons:
            if processes.index() == 0:
                for folder in self.directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                    _remove(folder)
            self._checkpointer.reload()  # it counts the step as saved
        steps = [checkpoint.step for checkpoint in self._checkpointer.checkpoints]
        self._failures.note(step, reasons[0] if reasons else None, max(steps, default=None), log=log)

    def _write_record(self) -> None:
        """Adds the record to a step that is complete but for it; Orbax calls this on process 0, in its own thread."""
        assert self._saving is not None
        step, digests = self._saving
        (folder,) = self.directory.resolve().glob(f"{step}.orbax-checkpoint-tmp*")
        tensors = {path: copies[0] for path, copies in digests.each().items()}
        step_record.write(folder, self.directory.resolve() / str(step), tensors)

    def wait(self) -> None:
        """Waits for the last save. Raises `ConfigError` if it failed."""
        self._settle(log=False)
        self._failures.check()

    def steps(self) -> list[int]:
        """Returns the steps that are complete on the disk, in order; waits for a save under way."""
        self._settle()
        if not self._opened:
            return step_record.steps_in(self.directory)
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def latest(self) -> int | None:
        """Returns the newest step; None if there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step with the highest `best_metric`, the later of equals; None if no step was evaluated."""
        scores = [(self._score(metrics), step) for step, metrics in self._metrics().items()]
        measured = [(score, step) for score, step in scores if score > -math.inf]
        return max(measured)[1] if measured else None

    def would_keep(self, metrics: Mapping[str, float] | None) -> bool:
        """Returns whether a step with these metrics, if it were saved, would be kept as one of the best."""
        if not self._keep_best:
            return False
        score = self._score(metrics)
        as_good = [saved for saved in self._metrics().values() if self._score(saved) >= score]
        return score > -math.inf and len(as_good) < self._keep_best

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns the `metadata` with which the step was saved."""
        folder = self.directory / str(self._chosen(step))
        found = _agreed(folder, lambda: step_record.metadata_of(folder))
        return {name: value for name, value in found.items() if name != step_record.MARK}

    def restore(self, abstract: Trees, step: Step | None = None) -> tuple[int, dict[str, Any]]:
        """Reads a step, with the shapes, types and shardings of `abstract`.

        A step that is deleted meanwhile, by the run that trains, is read again: the newest or best that there is then.

        Args:
          abstract: name -> tree of `jax.ShapeDtypeStruct`, for some or all of the names that were saved. Under
            `jax.set_mesh` this may be what `jax.eval_shape` returns: its abstract mesh stands for the one that is set,
            and a tensor without a sharding is replicated on every device.
          step: the step to read; None: the newest.

        Returns:
          The step, and name -> tree of arrays.

        Raises:
          ConfigError: names a tensor that is missing, that is not in `abstract`, or that has another shape or type; or
            what of the step is damaged, and the newest step that is whole.
        """
        return self.reading(lambda chosen: self.load(abstract, chosen), "newest" if step is None else step)

    def reading(self, read: Callable[[int], Any], step: Step) -> tuple[int, Any]:
        """Returns a step, and the result of `read` of it, which raises `Damaged` on all processes; see `restore`."""
        for _ in range(_TRIES):
            chosen = self._chosen(step)
            try:
                return chosen, read(chosen)
            except Damaged as error:
                if not processes.gather(self._deleted(chosen, step, error))[0]:
                    whole_step = processes.gather(self._newest_whole(chosen))[0]
                    if whole_step is None:
                        raise ConfigError(
                            f"{error}; no other step is whole, so restore the folder from a copy"
                        ) from error
                    raise ConfigError(
                        f"{error}; the newest step that is whole is {whole_step}: name it by step"
                    ) from error
        raise ConfigError(f"{self.directory}: a step was deleted while it was read, {_TRIES} times; try again")

    def load(self, abstract: Trees, step: int) -> dict[str, Any]:
        """Returns the trees of one step; see `restore`. Raises `Damaged` on all processes for one that is not whole."""
        folder = self.directory / str(step)
        abstract = {name: jax.tree.map(whole.with_sharding, tree) for name, tree in abstract.items()}
        record = self.record(step)
        names = _agreed(folder, lambda: whole.trees_of(folder))
        for name in abstract:
            if name not in names:
                raise ConfigError(f"checkpoint {folder}: holds no {name!r}, only {', '.join(names)}")
        saved = _agreed(folder, lambda: whole.structure(folder, record, abstract))
        for name, tree in abstract.items():
            wanted = {path: described(leaf) for path, leaf in tensors_of(name, tree).items()}
            if differences := whole.differences(saved[name], wanted):
                more = f" (and {len(differences) - 1} more differ)" if len(differences) > 1 else ""
                raise ConfigError(
                    f"checkpoint {folder}: {differences[0]}{more}; use the config it was saved with, or another workdir"
                )
        trees = _agreed(folder, lambda: {name: whole.load(folder, name, tree) for name, tree in abstract.items()})
        if record is not None:
            found = self._digests.start(trees)
            _agreed(folder, lambda: whole.compare(folder, record, found.each()))
        return trees

    def tensors(self, step: int, name: str) -> dict[str, np.ndarray] | None:
        """Returns a tree of a step as numpy arrays by name, whole, if it fits easily into memory; else None.

        In a job of several processes, of which each needs only a part, it verifies a share on each and returns None. It
        does so, too, of a large tree; and without `verify` it reads nothing.

        Raises `Damaged` on all processes for a tensor that is not whole.
        """
        folder, record = self.directory / str(step), self.record(step)
        if record is None:
            return None
        count = jax.process_count()
        sizes = _agreed(folder, lambda: whole.bytes_of(folder, name))
        if count == 1 and sizes <= LARGEST_IN_MEMORY:
            return whole.tensors(folder, record, name)
        _agreed(folder, lambda: whole.verify(folder, record, name, slice(jax.process_index(), None, count)))
        return None

    def record(self, step: int) -> Record | None:
        """Returns the record of a step whose files it agrees with; None where there is none, or nothing is verified.

        Raises `Damaged` on all processes.
        """
        folder = self.directory / str(step)
        if not self._verify:
            return None

        def checked() -> dict[str, Any] | None:
            if processes.index() > 0:
                return None
            record = whole.checked_record(folder)
            if record is None:
                _log.warning("%s: has no digests, so not all damage to it would be noticed", folder)
                return None
            return record.to_json()

        found = processes.gather(_agreed(folder, checked))[0]
        return None if found is None else Record(**found)

    def close(self) -> None:
        """Waits for a save under way, whose error it raises, and releases the directory."""
        if self._opened:
            self._checkpointer.close()

    def _chosen(self, step: Step) -> int:
        """Returns the number of a step; process 0 looks for all. Raises `ConfigError` if there is none."""
        steps, best = processes.gather([self.steps(), self.best() if step == "best" else None])[0]
        if not steps:
            raise ConfigError(f"{self.directory}: no checkpoint here; give the workdir of a run that has saved one")
        if step == "newest":
            return steps[-1]
        if step == "best":
            if best is None:
                raise ConfigError(f"{self.directory}: no checkpoint has been evaluated, so none is the best")
            return best
        if step not in steps:
            existing = ", ".join(map(str, steps))
            raise ConfigError(f"{self.directory}: no checkpoint of step {step}; there are {existing}")
        return step

    def _deleted(self, chosen: int, step: Step, error: Damaged) -> bool:
        """Returns whether a step was deleted, or a newer one has come, while it was read."""
        if step == "newest" and self.latest() not in (chosen, None):
            return True
        end = time.monotonic() + _DELETION_SECONDS * error.missing
        while (self.directory / str(chosen)).is_dir():
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)
        return True

    def _newest_whole(self, besides: int) -> int | None:
        """Returns the newest other step that is whole; only process 0 looks."""
        others = [step for step in reversed(self.steps()) if step != besides and processes.index() == 0]
        return next((step for step in others if whole.problem(self.directory / str(step)) is None), None)

    def _metrics(self) -> dict[int, Mapping[str, float] | None]:
        """Returns the metrics of each step; those of a step that is damaged, which is logged, are left out."""
        self._settle()
        if self._opened:
            return {checkpoint.step: checkpoint.metrics for checkpoint in self._checkpointer.checkpoints}
        found = dict[int, Mapping[str, float] | None]()
        for step in self.steps():
            try:
                found[step] = step_record.metrics_of(self.directory / str(step))
            except Damaged as error:
                _log.warning("%s; it is not looked at for the best", error)
        return found

    def _score(self, metrics: Mapping[str, float] | None) -> float:
        value = (metrics or {}).get(self._best_metric, -math.inf)
        return -math.inf if math.isnan(value) else value


def _remove(folder: Path) -> None:
    """Removes a folder to which other threads of a save that has failed may still write for a moment."""
    for _ in range(_REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)


def _agreed(folder: Path, read: Callable[[], Any]) -> Any:
    """Returns the result of `read`; if it raises `Damaged` on any process, so do all."""
    result, own = None, None
    try:
        result = read()
    except Damaged as error:
        own = [error.reason, error.missing]
    for found in processes.gather(own):
        if found is not None:
            raise Damaged(folder, found[0], missing=found[1])
    return result

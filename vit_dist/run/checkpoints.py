"""Checkpoints of a run, saved while the training goes on (Orbax).

A checkpoint is a few named trees of arrays, such as `parameters`, `ema` and `optimizer`, each saved under its
own name, so that evaluation reads the parameters and leaves the optimizer on the disk. The shapes, types and shardings
wanted are given as `jax.ShapeDtypeStruct`s, and may lie on another mesh than the one that saved. What is on the disk is
always whole: a save that was cut short leaves only a temporary folder, which the next run that saves clears away.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from vit_dist.config import ConfigError

Trees = Mapping[str, Any]  # name -> a tree of arrays, or of jax.ShapeDtypeStructs

# Where several devices hold an array whole, Orbax lets each device write a slice of it, and compiles a function for
# each slice of each shape. With slices below so many bytes, compiling takes longer than one device takes to write all.
SMALLEST_SLICE = 2**18


class Checkpoints:
    """The steps saved in one directory. In a job of several processes, each calls every method.

    The newest `keep_last` steps are kept, and besides them the `keep_best` of the highest `best_metric`; a NaN ranks
    below every number. The newest step is never deleted, and an old one only once the newer is whole.
    """

    def __init__(
        self, directory: Path, *, keep_last: int, keep_best: int, best_metric: str = "top1", read_only: bool = False
    ):
        """Opens `directory`, which is made where there is none; `read_only` refuses that, and touches nothing."""
        if read_only and not directory.is_dir():
            raise ConfigError(f"{directory}: no checkpoints here; give the workdir of a run that has saved one")
        self._directory = directory
        self._best_metric, self._keep_best = best_metric, keep_best
        policies = ocp.training.preservation_policies
        context = ocp.Context()
        context.array.saving.min_slice_bytes_for_replica_parallel = SMALLEST_SLICE
        self._checkpointer = ocp.training.Checkpointer(
            directory.resolve(),
            context=context,
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep_last),
                    policies.BestN(get_metric_fn=self._score, n=keep_best, keep_checkpoints_without_metrics=False),
                ]
            ),
            cleanup_tmp_directories=not read_only,
        )

    def save(
        self,
        step: int,
        state: Trees,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Begins to save, and returns once `state` is copied: the caller may donate its buffers at once.

        Waits for the save before it, and raises what went wrong in that one. A step that is already saved is left as
        it is: a resumed run reaches it with the same state. `metadata` is anything that JSON can hold.
        """
        if step in self.steps():
            return
        self._checkpointer.save_checkpointables_async(
            step,
            dict(state),  # Orbax adds its own entries to the dict that it is given
            force=True,
            metrics=None if metrics is None else {name: float(value) for name, value in metrics.items()},
            custom_metadata=None if metadata is None else dict(metadata),
        )

    def wait(self) -> None:
        """Returns when nothing is being saved; raises what went wrong in the last save."""
        self._checkpointer.wait()

    def steps(self) -> list[int]:
        """The steps that are whole on the disk, in order; waits for one that is being saved."""
        self.wait()
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step of the highest `best_metric`, the later of equals; None where no step has been measured."""
        self.wait()
        scores = [(self._score(checkpoint.metrics), checkpoint.step) for checkpoint in self._checkpointer.checkpoints]
        measured = [(score, step) for score, step in scores if score > -math.inf]
        return max(measured)[1] if measured else None

    def would_keep(self, metrics: Mapping[str, float] | None) -> bool:
        """Whether a step of these metrics, were it saved, would be kept as one of the best."""
        if not self._keep_best:
            return False
        self.wait()
        score = self._score(metrics)
        as_good = [one for one in self._checkpointer.checkpoints if self._score(one.metrics) >= score]
        return score > -math.inf and len(as_good) < self._keep_best

    def metadata(self, step: int) -> dict[str, Any]:
        """What `save` was given as `metadata`."""
        return dict(self._checkpointer.checkpointables_metadata(self._existing(step)).custom_metadata or {})

    def restore(self, abstract: Trees, step: int | None = None) -> tuple[int, dict[str, Any]]:
        """The step (None: the newest) and the trees named in `abstract`, laid out as its shardings say.

        `abstract` is name -> tree of `jax.ShapeDtypeStruct`, for some or all of the names that were saved. What
        `jax.eval_shape` returns will do under `jax.set_mesh`: its abstract mesh stands for the one that is set, and
        a tensor of no sharding is put whole on every device. Raises `ConfigError` naming the tensor that is missing,
        that nobody asked for, or that has another shape or type.
        """
        step = self._existing(step)
        saved = self._checkpointer.checkpointables_metadata(step).metadata
        for name, tree in abstract.items():
            where = f"checkpoint {self._directory / str(step)}"
            if name not in saved:
                raise ConfigError(f"{where}: holds no {name!r}, only {', '.join(sorted(saved))}")
            differences = _differences(_tensors(name, saved[name]), _tensors(name, tree))
            if differences:
                more = f" (and {len(differences) - 1} more differ)" if len(differences) > 1 else ""
                raise ConfigError(
                    f"{where}: {differences[0]}{more}; use the config it was saved with, or another workdir"
                )
        return step, self._checkpointer.load_checkpointables(step, jax.tree.map(_placed, dict(abstract)))

    def close(self) -> None:
        """Waits like `wait`, and lets go of the directory."""
        self._checkpointer.close()

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise ConfigError(f"{self._directory}: no checkpoint here; give the workdir of a run that has saved one")
        if step is None:
            return steps[-1]
        if step not in steps:
            there = ", ".join(map(str, steps))
            raise ConfigError(f"{self._directory}: no checkpoint of step {step}; there are {there}")
        return step

    def _score(self, metrics: Mapping[str, float] | None) -> float:
        value = (metrics or {}).get(self._best_metric, -math.inf)
        return -math.inf if math.isnan(value) else value


def _placed(wanted: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """With a sharding of this run's devices in any case; without, Orbax would look for the devices that saved."""
    if wanted.sharding is not None:
        return wanted
    mesh = jax.sharding.get_mesh()
    sharding = SingleDeviceSharding(jax.local_devices()[0]) if mesh.empty else NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(wanted.shape, wanted.dtype, sharding=sharding)


def _tensors(name: str, tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path, such as `parameters/head/kernel` -> (shape, type)."""
    leaves = jax.tree.flatten_with_path(tree)[0]
    return {
        "/".join((name, jax.tree_util.keystr(path, simple=True, separator="/"))): (
            tuple(leaf.shape),
            np.dtype(leaf.dtype).name,
        )
        for path, leaf in leaves
    }


def _differences(
    saved: dict[str, tuple[tuple[int, ...], str]], wanted: dict[str, tuple[tuple[int, ...], str]]
) -> list[str]:
    """A sentence for each tensor that keeps `saved` from being read as `wanted`."""
    missing = [f"has no tensor {path}" for path in wanted if path not in saved]
    extra = [f"has a tensor {path} that this run has not" for path in saved if path not in wanted]
    other = [
        f"tensor {path} is {_say(saved[path])}, expected {_say(wanted[path])}"
        for path in wanted
        if path in saved and saved[path] != wanted[path]
    ]
    return missing + other + extra


def _say(tensor: tuple[tuple[int, ...], str]) -> str:
    shape, dtype = tensor
    return f"{dtype}[{', '.join(map(str, shape))}]"

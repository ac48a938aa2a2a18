"""Checkpoints of a run, saved while the training goes on (Orbax).

A checkpoint is a few named trees of arrays, such as `parameters`, `ema` and `optimizer`, each saved under its own name,
so that evaluation reads the parameters and leaves the optimizer on the disk. `restore` takes the shapes, types and
shardings as `jax.ShapeDtypeStruct`s, which may be on another mesh than the one that saved. A checkpoint on the disk is
always complete: an interrupted save leaves only a temporary folder, which the next run that saves removes.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from vit_dist.config import ConfigError

Step = int | Literal["newest", "best"]  # which checkpoint of a run; the best is that of the highest top-1
Trees = Mapping[str, Any]  # name -> tree of arrays, or of jax.ShapeDtypeStructs

# If several devices hold copies of an array, Orbax lets each device write a slice of it, and compiles a function for
# each slice of each shape. For slices of fewer bytes, compiling takes longer than one device takes to write the array.
SMALLEST_SLICE = 2**18


class Checkpoints:
    """The steps saved in one directory. In a job of several processes, each calls every method.

    It keeps the newest `keep_last` steps, and also the `keep_best` steps with the highest `best_metric`; a NaN ranks
    below every number. It never deletes the newest step, and an old step only once the newer one is complete.
    """

    def __init__(
        self, directory: Path, *, keep_last: int, keep_best: int, best_metric: str = "top1", read_only: bool = False
    ):
        """Opens `directory`, and makes it if it is missing; with `read_only` raises `ConfigError` and never writes."""
        if read_only and not directory.is_dir():
            raise ConfigError(f"{directory}: no checkpoints here; give the workdir of a run that has saved one")
        self._directory = directory
        self._best_metric, self._keep_best = best_metric, keep_best
        policies = ocp.training.preservation_policies
        context = ocp.Context()
        context.array.saving.min_slice_bytes_for_replica_parallel = SMALLEST_SLICE
        best = policies.BestN(get_metric_fn=self._score, n=keep_best, keep_checkpoints_without_metrics=False)
        self._checkpointer = ocp.training.Checkpointer(
            directory.resolve(),
            context=context,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep_last), best]),
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
        """Begins to save, and returns once `state` is copied: the caller may then donate its buffers.

        Waits for the previous save, and raises its error if it failed. Does nothing for a step that is already saved: a
        resumed run reaches it with the same state.

        Args:
          step: the number of the step.
          state: the trees to save, by name.
          metrics: the step's evaluation, which decides whether it is among the best; None: it was not evaluated.
          metadata: anything that JSON can hold.
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
        """Waits for the last save, and raises its error if it failed."""
        self._checkpointer.wait()

    def steps(self) -> list[int]:
        """Returns the steps that are complete on the disk, in order; waits for a save under way."""
        self.wait()
        return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

    def latest(self) -> int | None:
        """Returns the newest step; None if there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step with the highest `best_metric`, the later of equals; None if no step was evaluated."""
        self.wait()
        scores = [(self._score(checkpoint.metrics), checkpoint.step) for checkpoint in self._checkpointer.checkpoints]
        measured = [(score, step) for score, step in scores if score > -math.inf]
        return max(measured)[1] if measured else None

    def would_keep(self, metrics: Mapping[str, float] | None) -> bool:
        """Returns whether a step with these metrics, if it were saved, would be kept as one of the best."""
        if not self._keep_best:
            return False
        self.wait()
        score = self._score(metrics)
        as_good = [saved for saved in self._checkpointer.checkpoints if self._score(saved.metrics) >= score]
        return score > -math.inf and len(as_good) < self._keep_best

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns the `metadata` with which the step was saved."""
        return dict(self._checkpointer.checkpointables_metadata(self._existing(step)).custom_metadata or {})

    def restore(self, abstract: Trees, step: int | None = None) -> tuple[int, dict[str, Any]]:
        """Reads a step, with the shapes, types and shardings of `abstract`.

        Args:
          abstract: name -> tree of `jax.ShapeDtypeStruct`, for some or all of the names that were saved. Under
            `jax.set_mesh` this may be what `jax.eval_shape` returns: its abstract mesh stands for the one that is set,
            and a tensor without a sharding is replicated on every device.
          step: the step to read; None: the newest.

        Returns:
          The step, and name -> tree of arrays.

        Raises:
          ConfigError: names a tensor that is missing, that is not in `abstract`, or that has another shape or type.
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
        return step, self._checkpointer.load_checkpointables(step, jax.tree.map(_with_sharding, dict(abstract)))

    def close(self) -> None:
        """Waits like `wait`, and releases the directory."""
        self._checkpointer.close()

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        if not steps:
            raise ConfigError(f"{self._directory}: no checkpoint here; give the workdir of a run that has saved one")
        if step is None:
            return steps[-1]
        if step not in steps:
            existing = ", ".join(map(str, steps))
            raise ConfigError(f"{self._directory}: no checkpoint of step {step}; there are {existing}")
        return step

    def _score(self, metrics: Mapping[str, float] | None) -> float:
        value = (metrics or {}).get(self._best_metric, -math.inf)
        return -math.inf if math.isnan(value) else value


def _with_sharding(tensor: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Adds a sharding on this run's devices where there is none: Orbax would look for the devices that saved."""
    if tensor.sharding is not None:
        return tensor
    mesh = jax.sharding.get_mesh()
    sharding = SingleDeviceSharding(jax.local_devices()[0]) if mesh.empty else NamedSharding(mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(tensor.shape, tensor.dtype, sharding=sharding)


def _tensors(name: str, tree: Any) -> dict[str, str]:
    """Returns path, such as `parameters/head/kernel` -> type and shape, such as `float32[8, 10]`."""
    return {
        f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}": (
            f"{np.dtype(leaf.dtype).name}[{', '.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _differences(saved: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Returns a phrase for each tensor that keeps `saved` from being read as `wanted`."""
    missing = [f"has no tensor {path}" for path in wanted if path not in saved]
    extra = [f"has a tensor {path} that this run does not have" for path in saved if path not in wanted]
    other = [
        f"tensor {path} is {saved[path]}, expected {tensor}"
        for path, tensor in wanted.items()
        if saved.get(path, tensor) != tensor
    ]
    return missing + other + extra

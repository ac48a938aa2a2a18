"""What a row of training metrics says: what the step measured, and how fast the steps up to it went.

Reading a metric waits for its step. So a row is kept pending, with its numbers still on the devices, until the step
after it is under way.
"""

import dataclasses
import hashlib
import time
from typing import Any

import jax
import numpy as np

from vit_dist.mesh.feed import Prefetch
from vit_dist.program import Program
from vit_dist.run.devices import memory_in_use


class Window:
    """The stretch of steps that a row's rates are of. It begins anew after a compilation, evaluation or save."""

    def __init__(self, step: int, batches: Prefetch):
        self._batches = batches
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._begun, self._batches.waited = step, time.perf_counter(), 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def rates(self, step: int) -> tuple[float, float] | None:
        """(seconds a step, share of them spent waiting for data) up to `step`; None where it has no steps.

        The next stretch begins here.
        """
        seconds, waited, count = self.seconds(), self._batches.waited, step - self._step
        self.restart(step)
        return (seconds / count, waited / seconds) if count else None


@dataclasses.dataclass
class Pending:
    """What a logged step measured, still on the devices; `skipped`: this process's files that did not decode so far."""

    step: int
    metrics: dict[str, jax.Array]
    window: Window
    skipped: int

    def read(self, program: Program) -> dict[str, Any]:
        """Waits for the step and returns its row."""
        values: dict[str, Any] = dict(jax.device_get(self.metrics))
        ids = values.pop("ids", None)
        row: dict[str, Any] = {name: float(value) for name, value in values.items()}
        rates = self.window.rates(self.step)
        if rates is not None:
            step_seconds, waiting = rates
            rate = program.settings.batch_size / step_seconds
            row |= {
                "images_per_second": rate,
                "images_per_second_per_device": rate / program.mesh.size,
                "step_ms": step_seconds * 1000,
                "data_wait_fraction": waiting,
                "mfu": program.mfu(step_seconds),
            }
        row["memory_bytes"] = memory_in_use(program.mesh.devices.flat)
        if self.skipped:
            row["skipped"] = self.skipped
        if ids is not None:
            row["examples"] = hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()[:16]
        return row

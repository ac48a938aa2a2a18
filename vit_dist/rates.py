"""Rows of training metrics: what a step measured, and the speed of the steps since the previous row.

Reading a metric waits for its step. So a row stays pending, with its numbers on the devices, until the next step has
been dispatched.
"""

import dataclasses
import hashlib
import logging
import time
from typing import Any

import jax
import numpy as np

from vit_dist.data.stream.loader import Batches
from vit_dist.data.stream.timings import NAMES, Timings
from vit_dist.mesh.feed import Prefetch
from vit_dist.program import Program
from vit_dist.run.devices import memory_in_use

_log = logging.getLogger(__name__)
SLOW_DATA = 0.05  # share of the time spent waiting for data from which on a warning is logged
MIN_CHECK_S = 10.0  # of steps that are checked together: within fewer one late thread is 5 % of the time
_WARN_AGAIN_S = 60.0


@dataclasses.dataclass(frozen=True)
class Rates:
    """The speed of a window of steps."""

    seconds: float
    steps: int
    waited: float  # seconds that the loop waited for data
    data: Timings  # of making that data

    def plus(self, other: "Rates") -> "Rates":
        """Returns the rates of both windows together."""
        data = dataclasses.replace(self.data)
        data.add(other.data)
        return Rates(self.seconds + other.seconds, self.steps + other.steps, self.waited + other.waited, data)


class Window:
    """Measures the steps between two rows. It restarts after a compilation, evaluation or save."""

    def __init__(self, step: int, host_batches: Batches, batches: Prefetch):
        self._host_batches, self._batches = host_batches, batches
        self._warned_at: float | None = None
        self._unchecked: Rates | None = None
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._begun = step, time.perf_counter()
        self._waited, self._data = self._batches.waited, self._data_timings()

    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def rates(self, step: int) -> Rates | None:
        """Returns the rates of the steps up to `step`, None without any, and restarts the window."""
        data, waited = self._data_timings().since(self._data), self._batches.waited - self._waited
        rates = Rates(self.seconds(), step - self._step, waited, data)
        self.restart(step)
        return rates if rates.steps else None

    def warn_of_slow_data(self, rates: Rates, step: int) -> None:
        """Warns, once a minute at most, that the devices wait for data, and names the slowest stage of making it.

        Args:
          rates: of the newest window; windows are checked together once they last `MIN_CHECK_S`.
          step: the last step of that window.
        """
        rates = self._unchecked.plus(rates) if self._unchecked is not None else rates
        self._unchecked = rates if rates.seconds < MIN_CHECK_S else None
        if self._unchecked is not None:
            return
        now = time.perf_counter()
        if rates.waited <= SLOW_DATA * rates.seconds or (self._warned_at and now - self._warned_at < _WARN_AGAIN_S):
            return
        self._warned_at = now
        stages = ", ".join(f"{name} {getattr(rates.data, name) / rates.steps * 1000:.3g}" for name in NAMES)
        _log.warning(
            "step %d: %.0f %% of the time was spent waiting for data; the slowest stage is %s (ms per batch: %s; %d "
            "threads or processes share all but copy)",
            step,
            100 * rates.waited / rates.seconds,
            rates.data.slowest(self._host_batches.parallel),
            stages,
            self._host_batches.parallel,
        )

    def _data_timings(self) -> Timings:
        made = self._host_batches.timings
        return dataclasses.replace(made, copy=made.copy + self._batches.copied)


@dataclasses.dataclass
class Pending:
    """The metrics of a logged step, still on the devices."""

    step: int
    metrics: dict[str, jax.Array]
    window: Window

    def read(self, program: Program) -> dict[str, Any]:
        """Waits for the step and returns its row."""
        values: dict[str, Any] = dict(jax.device_get(self.metrics))
        ids = values.pop("ids", None)
        row: dict[str, Any] = {name: float(value) for name, value in values.items()}
        rates = self.window.rates(self.step)
        if rates is not None:
            self.window.warn_of_slow_data(rates, self.step)
            step_seconds = rates.seconds / rates.steps
            rate = program.settings.batch_size / step_seconds
            row |= {
                "images_per_second": rate,
                "images_per_second_per_device": rate / program.mesh.size,
                "step_ms": step_seconds * 1000,
                "data_wait_fraction": rates.waited / rates.seconds,
                "mfu": program.mfu(step_seconds),
            }
        row["memory_bytes"] = memory_in_use(program.mesh.devices.flat)
        if ids is not None:
            row["examples"] = hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()[:16]
        return row

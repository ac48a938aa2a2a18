"""What a row of training metrics says: what the step measured, and how fast the steps up to it went.

Reading a metric waits for its step. So a row is kept pending, with its numbers still on the devices, until the step
after it is under way.
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
SLOW_DATA = 0.05  # of the time: more spent waiting for data is said, with the stage to blame
JUDGED_S = 10.0  # seconds of steps that are judged together: in a few of a tiny set, a late thread is 5 % already
_SAY_AGAIN_S = 60.0


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of a stretch of steps: its seconds and count, the seconds waited for data, what making that data took."""

    seconds: float
    steps: int
    waited: float
    stages: Timings

    def plus(self, other: "Rates") -> "Rates":
        """Of both stretches together."""
        stages = dataclasses.replace(self.stages)
        stages.add(other.stages)
        return Rates(self.seconds + other.seconds, self.steps + other.steps, self.waited + other.waited, stages)


class Window:
    """The stretch of steps that a row's rates are of. It begins anew after a compilation, evaluation or save."""

    def __init__(self, step: int, host: Batches, batches: Prefetch):
        self._host, self._batches = host, batches
        self._said_at: float | None = None
        self._unjudged: Rates | None = None
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._begun = step, time.perf_counter()
        self._waited, self._stages = self._batches.waited, self._spent()

    def seconds(self) -> float:
        return time.perf_counter() - self._begun

    def rates(self, step: int) -> Rates | None:
        """Of the steps up to `step`; None where there are none. The next stretch begins here."""
        stages, waited = self._spent().since(self._stages), self._batches.waited - self._waited
        found = Rates(self.seconds(), step - self._step, waited, stages)
        self.restart(step)
        return found if found.steps else None

    def say_slow_data(self, rates: Rates, step: int) -> None:
        """Logs, once a minute at most, that the devices wait for data and which stage of making it is the slowest.

        rates: of the newest stretch; it is judged with those before it, once they make `JUDGED_S` together.
        """
        rates = self._unjudged.plus(rates) if self._unjudged is not None else rates
        self._unjudged = rates if rates.seconds < JUDGED_S else None
        if self._unjudged is not None:
            return
        now = time.perf_counter()
        if rates.waited <= SLOW_DATA * rates.seconds or (self._said_at and now - self._said_at < _SAY_AGAIN_S):
            return
        self._said_at = now
        spent = ", ".join(f"{name} {getattr(rates.stages, name) / rates.steps * 1000:.3g}" for name in NAMES)
        _log.warning(
            "step %d: %.0f %% of the time went by waiting for data; the slowest stage is %s (ms a batch: %s; all but "
            "the copying shared by %d)",
            step,
            100 * rates.waited / rates.seconds,
            rates.stages.slowest(self._host.parallel),
            spent,
            self._host.parallel,
        )

    def _spent(self) -> Timings:
        host = self._host.timings
        return dataclasses.replace(host, copy=host.copy + self._batches.copied)


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
        rates = self.window.rates(self.step)
        if rates is not None:
            self.window.say_slow_data(rates, self.step)
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

"""Stopping when asked to: SIGTERM means that the machine is wanted back, and that there is time for one save.

A single process catches the signal itself. In a job of several, the signal may reach one and not the others, or each
at another step; JAX's preemption service then agrees on one step for all to stop at.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """`with StopRequest() as stop:` around a loop that asks `stop.requested(step)` after every step.

    The handler that was there comes back at the end. Off the main thread Python lets nobody catch a signal, and a
    single process is then never asked to stop.
    """

    def __init__(self) -> None:
        self._asked = False
        self._previous: Any = None
        # In a job of several processes JAX's own handler must stay: it feeds the preemption service.
        self._catches = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._catches:
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._catches:
            # None: the handler before was not made in Python and cannot be put back from here
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._previous is None else self._previous)

    def requested(self, step: int) -> bool:
        """Whether to save and stop after `step`.

        In a job of several processes each must ask after every step; all are told yes at the same one, and only there.
        """
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

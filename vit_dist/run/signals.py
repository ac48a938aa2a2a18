"""Stopping when asked to: SIGTERM means that the machine is wanted back, and that there is time for one save.

A single process catches the signal itself, and Ctrl-C too: both are answered between two steps, where nothing is half
done. In a job of several, the signal may reach one and not the others, or each
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

    The handlers that were there come back at the end. Off the main thread Python lets nobody catch a signal, and a
    single process is then never asked to stop.
    """

    def __init__(self) -> None:
        self._asked: set[int] = set()
        self._previous: dict[int, Any] = {}
        # In a job of several processes JAX's own handler must stay: it feeds the preemption service.
        self._catches = jax.process_count() == 1 and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._catches:
            self._previous = {one: signal.signal(one, self._handle) for one in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, previous in self._previous.items():
            # None: the handler before was not made in Python and cannot be put back from here
            signal.signal(one, signal.SIG_DFL if previous is None else previous)

    def requested(self, step: int) -> bool:
        """Whether to save and stop after `step`.

        In a job of several processes each must ask after every step; all are told yes at the same one, and only there.
        Raises `KeyboardInterrupt` after a Ctrl-C.
        """
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        if signal.SIGINT in self._asked:
            raise KeyboardInterrupt
        return signal.SIGTERM in self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._asked:  # the second Ctrl-C will not wait
            raise KeyboardInterrupt
        self._asked.add(number)

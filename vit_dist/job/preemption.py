"""Stops a run when asked to: after the current step, with everything saved.

SIGTERM means that the scheduler needs the machine, Ctrl-C that the user wants to stop. A run answers both between two
steps. A single process catches the signals itself. In a job of several, a signal may reach one
process and not the others, or each at another step; JAX's preemption service then agrees on the step to stop at.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from vit_dist.job import processes


class StopRequest:
    """Catches the signals during a loop: `with StopRequest() as stop:`, then `stop.requested(step)` after every step.

    A second Ctrl-C does not wait for the end of the step. With `own_process` it ends the process at once by the signal,
    whatever code is running: unwinding while XLA compiles can crash. Otherwise it raises `KeyboardInterrupt`.

    The previous handlers are restored at the end. Python catches signals on the main thread only; on another thread a
    single process is never asked to stop.
    """

    def __init__(self, *, own_process: bool = False) -> None:
        self._own_process = own_process
        self._received: set[int] = set()
        self._previous: dict[int, Any] = {}
        self._alone = jax.process_count() == 1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # In a job of several processes JAX's own handler of SIGTERM must stay: it feeds the preemption service.
            caught = (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,)
            self._previous = {number: signal.signal(number, self._handle) for number in caught}
        return self

    def __exit__(self, *error: object) -> None:
        for number, previous in self._previous.items():
            # None: the previous handler was not set from Python and cannot be restored from here
            signal.signal(number, signal.SIG_DFL if previous is None else previous)

    def requested(self, step: int) -> bool:
        """Returns whether to save and stop after `step`.

        In a job of several processes each must call it after every step. All get True at the same step, and only there.
        """
        if self._alone:
            return bool(self._received)
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def by_user(self) -> bool:
        """Returns whether any process received Ctrl-C; all processes call it, once a stop was requested."""
        return any(processes.gather(signal.SIGINT in self._received))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if number in self._received:
                signal.signal(number, signal.SIG_DFL)  # a third Ctrl-C ends the process
                raise KeyboardInterrupt
            message = b"interrupted: finishing and saving this step; Ctrl-C again ends at once, unsaved\n"
            os.write(2, b"\n" * os.isatty(2) + message)  # a progress bar does not end its line
            if self._own_process:
                signal.signal(number, signal.SIG_DFL)
        self._received.add(number)
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's handler of it tells the other processes

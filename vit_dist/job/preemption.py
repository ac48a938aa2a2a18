"""Stops a run when asked to: after the current step, or batch of an evaluation, with everything saved.

SIGTERM means that the scheduler needs the machine, Ctrl-C that the user wants to stop. A run answers both between two
steps or batches. In a job of several processes, all of them agree on which (`agreement`). Before the first step a
process has nothing to save, and `signals` ends it.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import jax

from vit_dist.job import processes, signals


class StopEvaluation(Exception):
    """The run was asked to stop while it was evaluating; raised on all processes of a job at the same batch."""


_current: "StopRequest | None" = None  # that of the loop that is running


class StopRequest:
    """Catches the signals during a loop: `with StopRequest() as stop:`, then `stop.requested()` after every step.

    A second Ctrl-C does not wait for the end of the step. With `own_process` it ends the process at once by the signal,
    whatever code is running: unwinding while XLA compiles can crash. Otherwise it raises `KeyboardInterrupt`.

    The previous handlers are restored at the end. Python catches signals on the main thread only; on another thread a
    single process is never asked to stop.
    """

    def __init__(self, *, own_process: bool = False) -> None:
        self._own_process = own_process
        self._received: set[int] = set()
        self._interrupted = False
        self._previous: dict[int, Any] = {}
        self._alone = jax.process_count() == 1

    def __enter__(self) -> Self:
        global _current
        if threading.current_thread() is threading.main_thread():
            caught = (signal.SIGTERM, signal.SIGINT)
            self._previous = {number: signal.signal(number, self._handle) for number in caught}
            if self._alone:
                signals.hand_to(None)
                self._received |= signals.received()  # one whose exception was lost, such as in a callback
        _current = self
        return self

    def __exit__(self, *error: object) -> None:
        global _current
        _current = None
        for number, previous in self._previous.items():
            # None: the previous handler was not set from Python and cannot be restored from here
            signal.signal(number, signal.SIG_DFL if previous is None else previous)

    def requested(self) -> bool:
        """Returns whether to save and stop here.

        In a job of several processes each must call it equally often. All get True at the same call, and only there.
        """
        if self._alone:
            return bool(self._received)
        return processes.agreed_to_stop(next(iter(self._received), None))

    def by_user(self) -> bool:
        """Returns whether any process received Ctrl-C, once a stop was requested."""
        return signal.SIGINT in self._received if self._alone else processes.stopped_by_user()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                signal.signal(number, signal.SIG_DFL)  # a third Ctrl-C ends the process
                raise KeyboardInterrupt
            self._interrupted = True
            message = b"interrupted: finishing and saving this step; Ctrl-C again ends at once, unsaved\n"
            os.write(2, b"\n" * os.isatty(2) + message)  # a progress bar does not end its line
            if self._own_process:
                signal.signal(number, signal.SIG_DFL)
        self._received.add(number)


def check_between_batches() -> None:
    """Raises `StopEvaluation` if a training loop that evaluates was asked to stop; call it before every batch."""
    if _current is not None and _current.requested():
        raise StopEvaluation

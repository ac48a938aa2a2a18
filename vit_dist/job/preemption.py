"""Stopping when asked to: after the step under way, with everything saved.

SIGTERM means that the machine is wanted back, Ctrl-C that the user wants to stop. Both are answered between two steps,
where nothing is half done. A single process catches the signals itself. In a job of several, a signal may reach one
process and not the others, or each at another step; JAX's preemption service then agrees on the step to stop at.
"""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from vit_dist.job import processes


class StopRequest:
    """`with StopRequest() as stop:` around a loop that asks `stop.requested(step)` after every step.

    A second Ctrl-C does not wait for that. `own_process`: it ends the process at once, by the signal, whatever code is
    running; to unwind what XLA is compiling can crash. Else it raises `KeyboardInterrupt`.

    The handlers that were there come back at the end. Off the main thread Python lets nobody catch a signal, and a
    single process is then never asked to stop.
    """

    def __init__(self, *, own_process: bool = False) -> None:
        self._own_process = own_process
        self._asked: set[int] = set()
        self._previous: dict[int, Any] = {}
        self._alone = jax.process_count() == 1

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # In a job of several processes JAX's own handler of SIGTERM must stay: it feeds the preemption service.
            caught = (signal.SIGTERM, signal.SIGINT) if self._alone else (signal.SIGINT,)
            self._previous = {one: signal.signal(one, self._handle) for one in caught}
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
        """
        if self._alone:
            return bool(self._asked)
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def by_user(self) -> bool:
        """Whether it was Ctrl-C that asked, on any process; to be asked by all, once a stop was requested."""
        return any(processes.gather(signal.SIGINT in self._asked))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if number in self._asked:
                signal.signal(number, signal.SIG_DFL)  # a third ends the process
                raise KeyboardInterrupt
            bar = b"\n" * os.isatty(2)  # it has a progress bar, which does not end its line
            os.write(2, bar + b"interrupted: the step under way is finished and saved; Ctrl-C again ends at once\n")
            if self._own_process:
                signal.signal(number, signal.SIG_DFL)
        self._asked.add(number)
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)  # whose handler is JAX's, and tells the other processes

"""Worker processes that call a function of a number and return the results in order.

They are the standard library's pool, which sends results through pipes. Grain's worker processes send them through
shared memory, which can be left behind when a run ends at the wrong moment, and of which containers have little.
"""

import collections
import concurrent.futures
import fcntl
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

T = TypeVar("T")


class Workers(Iterator[T]):
    """An iterator over `make(0)` to `make(count - 1)`, which worker processes compute; the caller closes it.

    Iterating raises what `make` raises, and `RuntimeError` if a worker dies.

    Signals that ask a job to stop (SIGTERM, Ctrl-C) often reach all its processes. This process responds to them. The
    workers block them, since the last steps still need their results.
    """

    def __init__(self, make: Callable[[int], T], count: int, processes: int, ahead: int) -> None:
        """Starts no process yet.

        Args:
          make: is pickled and sent to each worker once.
          count: how many results there are.
          processes: how many workers.
          ahead: how many results may be ready or in progress at a time.
        """
        self._pool = concurrent.futures.ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(make,)
        )
        self._numbers, self._ahead = iter(range(count)), ahead
        self._pending: collections.deque[concurrent.futures.Future[T]] = collections.deque()

    def __next__(self) -> T:
        try:
            while len(self._pending) < self._ahead and (number := next(self._numbers, None)) is not None:
                self._pending.append(self._submit(number))
            if not self._pending:
                raise StopIteration
            return self._pending.popleft().result()
        except BrokenProcessPool as error:
            # The pool sends SIGTERM, which the workers block. (From Python 3.14 on, `kill_workers()` does this.)
            for process in list((self._pool._processes or {}).values()):
                process.kill()
            raise RuntimeError(
                f"data.workers: a worker process died ({error.__cause__ or error}); it was killed, ran out of memory, "
                "or the script that trains lacks its `if __name__ == '__main__':`"
            ) from error

    def close(self) -> None:
        """Waits until the workers have ended; drops unfinished results."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, number: int) -> concurrent.futures.Future[T]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            return self._pool.submit(_call_make, number)  # can start a process, which inherits the mask
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


_make: Callable[[int], Any]


def _begin(make: Callable[[int], Any]) -> None:
    global _make
    _make = make
    _end_with_parent()


def _end_with_parent() -> None:
    """Ends this process when its parent has ended; a parent that was killed cannot end it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()
    if sys.platform == "linux":
        # The thread needs Python's lock, which a long task in C can hold. So the kernel also sends SIGKILL when the
        # pipe from the parent closes. The parent sends nothing more through it, so nothing else triggers the signal.
        fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(parent.sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(parent.sentinel, fcntl.F_GETFL)
        fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)
        if wait([parent.sentinel], timeout=0):  # the parent ended before the signal was set up
            os._exit(1)


def _call_make(number: int) -> Any:
    return _make(number)

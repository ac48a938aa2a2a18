"""Worker processes that call a function of a number, for results in order.

The standard library's pool, and not Grain's worker processes: those hand results over in shared memory, of which some
is left behind when a run ends at the wrong moment, and containers have little of it. Here results come through pipes.
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
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Workers(Iterator[T], Generic[T]):
    """`make(0)`, `make(1)` and on, `count` in all, made by `processes`, at most `ahead` under way; to be closed.

    `make` is sent to each process once. Raises what `make` raises, and `RuntimeError` where a process dies.

    Signals that ask a job to stop (SIGTERM, Ctrl-C) often go to all its processes. They are this one's to answer, and
    the workers', whose results the last steps still need, are blocked.
    """

    def __init__(self, make: Callable[[int], T], count: int, processes: int, ahead: int) -> None:
        self._pool = concurrent.futures.ProcessPoolExecutor(
            processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(make,)
        )
        self._numbers, self._ahead = iter(range(count)), ahead
        self._under_way: collections.deque[concurrent.futures.Future[T]] = collections.deque()

    def __next__(self) -> T:
        try:
            while len(self._under_way) < self._ahead and (number := next(self._numbers, None)) is not None:
                self._under_way.append(self._submit(number))
            if not self._under_way:
                raise StopIteration
            return self._under_way.popleft().result()
        except BrokenProcessPool as error:
            for process in self._processes():
                process.kill()  # the pool asks them by SIGTERM, in vain
            raise RuntimeError(
                f"data.workers: a worker process died ({error.__cause__ or error}); it was killed, ran out of memory, "
                "or the script that trains lacks its `if __name__ == '__main__':`"
            ) from error

    def close(self) -> None:
        """Returns when the processes have ended; what they had under way is lost."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, number: int) -> concurrent.futures.Future[T]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            return self._pool.submit(_one, number)  # may start a process, which inherits the mask
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _processes(self) -> list[multiprocessing.Process]:
        return list((self._pool._processes or {}).values())  # `kill_workers()` comes with Python 3.14


_make: Callable[[int], Any]


def _begin(make: Callable[[int], Any]) -> None:
    global _make
    _make = make
    _end_with_parent()


def _end_with_parent() -> None:
    """Ends this process when the one that it works for has ended: if that was killed, nobody else would tell it to."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait_and_end() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_and_end, daemon=True).start()
    if sys.platform == "linux":
        # The thread needs Python's lock, which a long task in C may hold. So the kernel is asked for a signal when the
        # pipe from the parent closes, on which nothing is sent any more.
        fcntl.fcntl(parent.sentinel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(parent.sentinel, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(parent.sentinel, fcntl.F_GETFL)
        fcntl.fcntl(parent.sentinel, fcntl.F_SETFL, flags | os.O_ASYNC)
        if wait([parent.sentinel], timeout=0):  # it has ended before the signal was asked for
            os._exit(1)


def _one(number: int) -> Any:
    return _make(number)

"""SIGTERM and Ctrl-C, from the first line of `main` to the end of the process.

Where nothing has to be saved, the process ends with 75 or 130: the first signal raises `Stopped` on the main thread.
Python calls a handler between two of its own instructions: not while XLA compiles or a file system hangs. So the
kernel also writes each signal to a pipe, which a thread reads. It ends the process if the main thread has not done so
after `LAST_SECONDS`, or hands the signal on: in a job of several processes to the watchdog, which asks the others.
`preemption.StopRequest` takes over where there is something to save.
"""

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

from vit_dist.job.exit_codes import INTERRUPTED, PREEMPTED

VERBS = ("train", "eval", "predict", "features", "probe", "bench")  # the verbs that run as several processes
_AGAIN_SECONDS = 0.05  # after which a signal comes again that cannot be answered here
LAST_SECONDS = 10.0  # in which the process may end by itself
_STOPPING = (signal.SIGTERM, signal.SIGINT)
_COUNTS = ("VIT_DIST_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")  # how many processes were started together


class Stopped(KeyboardInterrupt):
    """The process was asked to stop, and has nothing to save."""


class _Answers:
    """What happens at a signal. There is one, made by `answer`."""

    def __init__(self, raises: bool) -> None:
        self.raises = raises  # whether the next signal raises `Stopped`
        self.received: set[int] = set()
        self.listener: Callable[[int], None] | None = None
        self.timer: threading.Timer | None = None
        self.final_code: int | None = None  # with which the process is about to end

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Runs on the main thread."""
        if _collects_garbage(frame):  # where an exception would be lost, and printed
            again = threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        self.received.add(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # a second Ctrl-C ends the process
        if self.raises:
            self.raises = False
            if _imports(frame):
                self.end()
            raise Stopped

    def read(self, pipe: int) -> None:
        """Runs on a thread of its own, which nothing holds up."""
        interrupts = 0
        while numbers := os.read(pipe, 64):
            for number in numbers:
                interrupts += number == signal.SIGINT
                if interrupts > 1 and self.listener is None:  # before the main thread came to answer the first
                    end_now(INTERRUPTED)
                if number in _STOPPING:
                    self.received.add(number)
                    (self.listener or self.count_down)(number)

    def count_down(self, number: int) -> None:
        if self.timer is None:
            self.timer = threading.Timer(LAST_SECONDS, self.end)
            self.timer.daemon = True
            self.timer.start()

    def end(self) -> None:
        if self.final_code is None:
            with contextlib.suppress(OSError, ValueError):  # nobody reads it
                print(describe(), file=sys.stderr, flush=True)
        end_now(exit_code() if self.final_code is None else self.final_code)


_answers: _Answers | None = None


def answer() -> None:
    """Begins to answer signals; the main thread of a process that does nothing but a verb calls it once.

    A process of a job does not end by itself before it has connected to the others, who would wait for it: the signal
    is kept until `alone` or `hand_to`, at most `LAST_SECONDS`. A signal that is ignored, such as Ctrl-C by a process in
    the background, stays ignored.
    """
    global _answers
    if _answers is not None:
        return
    in_job = sys.argv[1:2] and sys.argv[1] in VERBS and any(os.environ.get(name, "1") != "1" for name in _COUNTS)
    _answers = _Answers(raises=not in_job)
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    threading.Thread(target=_answers.read, args=(read_end,), name="signals", daemon=True).start()
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    for number in _STOPPING:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _answers.handle)
    atexit.register(_ignore)  # what is registered first is called last


def alone() -> None:
    """The process has no others to tell: a signal, also an earlier one, raises `Stopped`."""
    if _answers is not None:
        _answers.raises = True
        if _answers.received:
            _answers.raises = False
            raise Stopped


def hand_to(listener: Callable[[int], None] | None) -> None:
    """From now on `listener` alone is told of signals, also of earlier ones; it must not block. None: nobody is."""
    if _answers is None:
        return
    _answers.raises = False
    _answers.listener = listener or (lambda number: None)
    if _answers.timer is not None:
        _answers.timer.cancel()
    for number in list(_answers.received):
        _answers.listener(number)


def end(code: int) -> None:
    """The verb has ended: no signal changes the exit code any more, but ends a process that lingers."""
    if _answers is not None:
        _answers.raises, _answers.final_code, _answers.listener = False, code, None


def received() -> set[int]:
    """Returns the signals that the process has received."""
    return set() if _answers is None else set(_answers.received)


def exit_code() -> int:
    """Returns 75 after SIGTERM, 130 after Ctrl-C."""
    return code_of(received())


def code_of(received: set[int]) -> int:
    """Returns the exit code of a process that was stopped by these signals; Ctrl-C goes before SIGTERM."""
    return PREEMPTED if signal.SIGTERM in received and signal.SIGINT not in received else INTERRUPTED


def describe() -> str:
    """Returns how a process ends that was stopped with nothing to save, for people."""
    return "interrupted" if exit_code() == INTERRUPTED else "preempted: there was nothing to save"


def end_now(code: int) -> None:
    """Ends the process and those that it has started, without jax's shutdown, which waits for its peers."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # it has no reader any more, or its disk is full
            stream.flush()
    os._exit(code)


def _imports(frame: FrameType | None) -> bool:
    """Returns whether a module is being imported: an exception in the middle of one in C++ aborts the process."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _collects_garbage(frame: FrameType | None) -> bool:
    """Returns whether jax's callback of Python's garbage collection is running."""
    while frame is not None:
        if frame.f_code.co_name == "_xla_gc_callback":
            return True
        frame = frame.f_back
    return False


def _ignore() -> None:
    """The interpreter is about to go, and its handlers before it."""
    for number in _STOPPING:
        signal.signal(number, signal.SIG_IGN)

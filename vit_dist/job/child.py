"""One process of a launched job, as its launcher sees it: how it is started, heard, signalled and found ended.

A child is the leader of a session of its own, so that a terminal's Ctrl-C reaches the launcher alone, and so that those
it has started are ended with it. What it prints is shown by whole lines, which the launcher's one thread never mixes.
"""

import collections
import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TextIO

from vit_dist.job.blame import VARIABLE, Blame, read

TAIL = 20  # lines kept of each process, to be shown again if it fails
_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 20  # bytes; what is longer is cut, so that no process can fill the memory


class Child:
    """Process `index` of the job, started by its making. `ready` comes to hold its outputs, each to be `read`."""

    def __init__(
        self, command: Sequence[str], index: int, environment: Mapping[str, str], ready: selectors.BaseSelector
    ) -> None:
        self.index = index
        self.code: int | None = None  # with which it has ended; -n: by the signal n
        self.killed = False  # by its launcher, whatever it may have done before
        self.blame: Blame | None = None  # whom it holds at fault, once it has ended
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self._blames, blames = os.pipe()
        self.process = subprocess.Popen(
            command,
            env={**environment, VARIABLE: str(blames)},
            pass_fds=(blames,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_end_with_launcher(),
        )
        os.close(blames)
        out, err = (_Output(pipe, self.index, self.tail, ready) for pipe in (self.process.stdout, self.process.stderr))
        out.is_result = self.index == 0
        self._outputs = (out, err)

    def signal(self, number: int) -> None:
        """Sends it to the process or, to kill, to those too that it has started. Nothing where it has ended."""
        if self.code is None:
            self.killed = self.killed or number == signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if number == signal.SIGKILL else os.kill)(self.process.pid, number)

    def ended(self) -> bool:
        """Whether it has; then all that it printed is shown, and none of the processes that it started is left."""
        if self.process.poll() is None:
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):  # none is left, in the words of either system
            os.killpg(self.process.pid, signal.SIGKILL)
        for output in self._outputs:
            output.finish()
        self.blame = self._read_blame()
        self.code = self.process.returncode
        return True

    def _read_blame(self) -> Blame | None:
        """What it has written; a process that it started may hold the pipe open, and is not waited for."""
        os.set_blocking(self._blames, False)
        try:
            return read(os.read(self._blames, _CHUNK))
        except BlockingIOError:
            return None
        finally:
            os.close(self._blames)

    def innocence(self) -> int:
        """Of several that were found ended together the lowest is blamed: one killed from outside, an error, an abort.

        JAX aborts a process that has lost another, so an abort is more likely an effect than a cause.
        """
        assert self.code is not None
        return 2 if self.code == -signal.SIGABRT else 0 if self.code < 0 else 1

    def how(self) -> str:
        """How it ended, in words."""
        assert self.code is not None
        if self.killed and self.code == -signal.SIGKILL:
            return "had to be killed"
        if self.code >= 0:
            return f"failed with code {self.code}"
        name = next((one.name for one in signal.Signals if one == -self.code), f"signal {-self.code}")
        return f"was ended by {name}"


class _Output:
    """What a process prints on stdout or stderr: whole lines go to stderr after its number, or, a result's, to stdout.

    A carriage return ends a line too. What is no UTF-8 is escaped on stderr, and untouched on stdout.
    """

    def __init__(self, pipe: IO[bytes] | None, index: int, tail: collections.deque[str], ready: selectors.BaseSelector):
        assert pipe is not None
        self.is_result = False
        self._pipe, self._index, self._tail, self._ready = pipe, index, tail, ready
        self._unread = b""
        os.set_blocking(pipe.fileno(), False)
        ready.register(pipe, selectors.EVENT_READ, self)

    def read(self) -> bool:
        """Shows what has come since; False where nothing has."""
        if self._pipe.closed:
            return False
        try:
            data = os.read(self._pipe.fileno(), _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._close()
            return False
        lines = (self._unread + data).splitlines(keepends=True)
        # The last may go on, even after a carriage return: that may be half of an end.
        whole = lines[-1].endswith(b"\n") or len(lines[-1]) > _LONGEST_LINE
        self._unread = b"" if whole else lines.pop()
        self._show(lines)
        return True

    def finish(self) -> None:
        """Shows what is left, once the process has ended."""
        while self.read():
            pass
        self._close()

    def _close(self) -> None:
        if not self._pipe.closed:
            self._ready.unregister(self._pipe)
            self._pipe.close()
            self._show([self._unread] if self._unread else [])

    def _show(self, lines: Sequence[bytes]) -> None:
        lines = [line.rstrip(b"\r\n") for line in lines]
        texts = [line.decode("utf-8", "backslashreplace") for line in lines]
        self._tail.extend(texts)
        if self.is_result:
            _write(sys.stdout, b"".join(line + b"\n" for line in lines))
        else:
            _write(sys.stderr, "".join(f"[{self._index}] {text}\n" for text in texts).encode())


def say(text: str) -> None:
    """Prints a line of the launcher's own on stderr."""
    _write(sys.stderr, f"{text}\n".encode())


def _write(stream: TextIO, data: bytes) -> None:
    """Writes all of it, past the stream's own buffer. That nobody reads any more is no reason to end a job."""
    while data:
        try:
            data = data[os.write(stream.fileno(), data) :]
        except BlockingIOError:  # whoever shares the terminal has made it so
            time.sleep(0.05)
        except OSError:
            return


def _end_with_launcher() -> Callable[[], None] | None:
    """What a child calls before it becomes its program, so that it is killed where the launcher is killed.

    Linux only. The launcher has a single thread, so that nothing can be locked between its fork and this.
    """
    if sys.platform != "linux":
        return None
    prctl, launcher = ctypes.CDLL(None).prctl, os.getpid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG

    def end_with_launcher() -> None:
        prctl(set_parent_death_signal, int(signal.SIGKILL))
        if os.getppid() != launcher:  # which was killed before the line above
            os._exit(1)

    return end_with_launcher

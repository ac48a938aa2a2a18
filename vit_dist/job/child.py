"""One process of a launched job, as its launcher handles it: start, output, signals, end.

A child is the leader of a session of its own. A terminal's Ctrl-C then reaches the launcher alone, and the processes
that the child started can be ended with it. The launcher's only thread prints the output of all children line by line,
so lines of different processes never mix.
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

from vit_dist.escape import printable, printable_lines
from vit_dist.job.blame import VARIABLE, Blame, read
from vit_dist.job.exit_codes import MISTAKE

TAIL = 20  # lines kept of each process, to be printed again if it fails
HOLD_SECONDS = 6.0  # an `error:` line is held back so long while its process runs; a process that failed ends sooner
_CHUNK = 1 << 16
_ERROR = b"error: "
_LONGEST_LINE = 1 << 20  # bytes; longer lines are cut, so that no process can fill the launcher's memory


class Child:
    """Process `index` of the job; the constructor starts it and registers its outputs with `ready`, to be `read`.

    Attributes:
      code: the exit code, -n after signal n; None while the process runs.
      killed: whether the launcher sent SIGKILL.
      blame: which process this one reported as the one at fault; None before its end.
      tail: the last lines that it printed.
      stderr: its stderr, which holds back its last `error:` line after exit code 2.
    """

    def __init__(
        self, command: Sequence[str], index: int, environment: Mapping[str, str], ready: selectors.BaseSelector
    ) -> None:
        self.index = index
        self.code: int | None = None
        self.killed = False
        self.blame: Blame | None = None
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        read_end, write_end = os.pipe()
        self._blame_pipe = open(read_end, "rb", buffering=0)
        try:
            self.process = subprocess.Popen(
                command,
                env={**environment, VARIABLE: str(write_end)},
                pass_fds=(write_end,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_end_with_launcher(),
            )
        except BaseException:
            self._blame_pipe.close()
            raise
        finally:
            os.close(write_end)
        self._stdout = _Output(self.process.stdout, self, ready, is_result=index == 0)
        self.stderr = _Output(self.process.stderr, self, ready)

    def signal(self, number: int) -> None:
        """Sends a signal to the process; SIGKILL also goes to the processes that it started."""
        if self.code is None:
            self.killed = self.killed or number == signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if number == signal.SIGKILL else os.kill)(self.process.pid, number)

    def poll(self) -> bool:
        """Returns whether the process has ended; then prints the rest of its output, and ends those that it started.

        Closes its pipes. After exit code 2 its last `error:` line is not printed yet: see `_Output.error`.
        """
        if self.code is not None:
            return True
        if self.process.poll() is None:
            self._stdout.print_old_error()
            self.stderr.print_old_error()
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):  # no process is left; macOS raises the second
            os.killpg(self.process.pid, signal.SIGKILL)
        os.set_blocking(self._blame_pipe.fileno(), False)  # a process that it started may hold the pipe open
        self.blame = read(self._blame_pipe.read(_CHUNK) or b"")
        self.code = self.process.returncode
        self._blame_pipe.close()
        self._stdout.finish()
        self.stderr.finish(hold_error=self.code == MISTAKE)
        return True

    def blame_order(self) -> int:
        """Sort key: of several processes that were found ended together, the lowest is blamed.

        Processes killed from outside come first, then errors, then aborts: JAX aborts a process that has lost another,
        so an abort is more likely an effect than a cause.
        """
        assert self.code is not None
        return 2 if self.code == -signal.SIGABRT else 0 if self.code < 0 else 1

    def describe_end(self) -> str:
        """Returns how the process ended, as the predicate of a sentence."""
        assert self.code is not None
        if self.killed and self.code == -signal.SIGKILL:
            return "had to be killed"
        if self.code >= 0:
            return f"failed with code {self.code}"
        name = next((known.name for known in signal.Signals if known == -self.code), f"signal {-self.code}")
        return f"was ended by {name}"


class _Output:
    """The stdout or stderr of a process. Lines go to stderr with the process's number, those of a result to stdout.

    A carriage return ends a line too. Bytes that are not UTF-8 are escaped on stderr and unchanged on stdout. An
    `error:` line is held back until another line follows it: processes that end with the same usage error each print
    one, and the launcher prints it once.
    """

    def __init__(self, pipe: IO[bytes] | None, child: Child, ready: selectors.BaseSelector, *, is_result: bool = False):
        assert pipe is not None
        self._pipe, self._child, self._ready, self._is_result = pipe, child, ready, is_result
        self._unread = b""  # the start of a line, or an `error:` line that is held back
        self._read_at = 0.0
        os.set_blocking(pipe.fileno(), False)
        ready.register(pipe, selectors.EVENT_READ, self)

    def read(self) -> bool:
        """Prints the lines that have arrived; returns False if nothing has."""
        if self._pipe.closed:
            return False
        try:
            data = os.read(self._pipe.fileno(), _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._close(hold_error=True)
            return False
        self._read_at = time.monotonic()
        *lines, last = (self._unread + data).splitlines(keepends=True)
        # The last line may continue, even after a carriage return, which may be the first half of \r\n.
        complete = last.endswith(b"\n") and not last.startswith(_ERROR)
        self._unread = b"" if complete or len(last) > _LONGEST_LINE else last
        self._print(lines if self._unread else [*lines, last])
        return True

    @property
    def error(self) -> str:
        """The `error:` line that is held back; empty: none."""
        return _text(self._unread) if self._unread.startswith(_ERROR) else ""

    def print_old_error(self) -> None:
        """Prints the `error:` line that is held back, if it has been for `HOLD_SECONDS`."""
        if self.error and self._unread.endswith(b"\n") and time.monotonic() - self._read_at >= HOLD_SECONDS:
            self._print_unread()

    def finish(self, *, hold_error: bool = False) -> None:
        """Closes the pipe once the process has ended, and prints what is left, an `error:` line unless it is held."""
        while self.read():
            pass
        self._close(hold_error)

    def _close(self, hold_error: bool) -> None:
        if not self._pipe.closed:
            self._ready.unregister(self._pipe)
            self._pipe.close()
        if not (hold_error and self.error):
            self._print_unread()

    def _print_unread(self) -> None:
        self._print([self._unread] if self._unread else [])
        self._unread = b""

    def _print(self, lines: Sequence[bytes]) -> None:
        texts = [_text(line) for line in lines]
        self._child.tail.extend(texts)
        if self._is_result:
            _write(sys.stdout, b"".join(line.rstrip(b"\r\n") + b"\n" for line in lines))
        else:
            _write(sys.stderr, "".join(f"[{self._child.index}] {text}\n" for text in texts).encode())


def _text(line: bytes) -> str:
    return printable(line.rstrip(b"\r\n").decode("utf-8", "backslashreplace").expandtabs())


def print_line(text: str) -> None:
    """Prints a line of the launcher's own on stderr; those after it are indented."""
    _write(sys.stderr, f"{printable_lines(text)}\n".encode())


def _write(stream: TextIO, data: bytes) -> None:
    """Writes all of `data`, past the stream's own buffer. If the reader has closed the stream the job goes on."""
    while data:
        try:
            data = data[os.write(stream.fileno(), data) :]
        except BlockingIOError:  # another program on this terminal has made it non-blocking
            time.sleep(0.05)
        except OSError:
            return


def _end_with_launcher() -> Callable[[], None] | None:
    """Returns what a child calls before it executes its program, so that it is killed when the launcher is killed.

    Linux only. The launcher has a single thread, so no lock can be held between its fork and this call.
    """
    if sys.platform != "linux":
        return None
    prctl, launcher = ctypes.CDLL(None).prctl, os.getpid()
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG

    def end_with_launcher() -> None:
        prctl(set_parent_death_signal, int(signal.SIGKILL))
        if os.getppid() != launcher:  # the launcher was killed before the line above
            os._exit(1)

    return end_with_launcher

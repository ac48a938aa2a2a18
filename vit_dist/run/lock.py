"""One owner of a folder that is written: a file in it says which process that is.

The file is made exclusively, which decides between two that start together on any file system, NFS included. Its owner
touches it every few seconds and removes it at the end. One that was killed leaves it behind; the next owner takes over,
at once where it can see that the process is gone (the same boot of the same host, and the same processes in sight),
otherwise when the file has not been touched for the deadline. The file server tells the time: clocks need not agree.

The number in the file's name rises by one with each take-over: whoever makes the next number first has it, and nobody
ever removes a file that may have become another's.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.data.files import open_stream, remove_partial
from vit_dist.job import processes
from vit_dist.run.files import TEXT, WHOLE, mismatch

BEAT_SECONDS = 2.0  # between two touches
SHORTEST_DEADLINE = 5 * BEAT_SECONDS
_NAME = re.compile(r"\.owner\.([0-9]{1,9})")
_OWNER = {"host": TEXT, "sight": TEXT, "pid": WHOLE, "began": TEXT, "since": TEXT, "token": TEXT}
_POLL_SECONDS = 0.2
_HIDDEN = "unknown"  # when a process began, where the system does not say

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Holder:
    """The owner that a lock's file names, and when it was last touched, by the clock of the file server.

    `values` are None for a file that is damaged, or that its owner has made and not yet filled.
    """

    file: Path
    values: dict[str, Any] | None
    touched_ns: int

    def __str__(self) -> str:
        if self.values is None:
            return f"a process that {self.file} does not name"
        return "process {pid} on {host}, since {since}".format(**self.values)

    def in_sight(self) -> bool:
        """Returns whether this process can see whether the owner lives."""
        return self.values is not None and self.values["sight"] == _sight()

    def alive(self) -> bool:
        """Returns whether an owner in sight lives: its process id may have been given to another process since."""
        assert self.values is not None
        return _began(self.values["pid"]) in (self.values["began"], _HIDDEN)


class Lock:
    """A folder's lock, while this process holds it; a thread touches its file."""

    def __init__(self, folder: Path, deadline: float):
        """Takes the lock.

        Args:
          folder: exists.
          deadline: seconds after which an owner that this process cannot see is dead.

        Raises:
          ConfigError: another process holds it.
          OSError: the folder cannot be written.
        """
        self._folder, self._token = folder, uuid.uuid4().hex
        self._file = self._take(max(deadline, SHORTEST_DEADLINE))
        self._lost = ""
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._touch, name=f"lock of {folder}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `ConfigError` if another process has taken over, as after this one was suspended for long."""
        if self._lost:
            raise ConfigError(f"{self._folder}: {self._lost}; this process writes there no more")

    def release(self) -> None:
        """Stops touching the file and removes it."""
        self._ending.set()
        self._thread.join(SHORTEST_DEADLINE)  # it may wait for a file server
        if self._holds():
            self._file.unlink(missing_ok=True)

    def _holds(self) -> bool:
        holder = _holder(self._file)
        return holder is not None and holder.values is not None and holder.values["token"] == self._token

    def _take(self, deadline: float) -> Path:
        while True:
            dead = _dead_owners(self._folder, deadline)
            file = self._folder / f".owner.{max(map(_number, dead), default=0) + 1}"
            if not self._make(file):
                continue  # another process was first
            if {each.file for each in _holders(self._folder)} - {file} <= set(dead):
                break
            # Two have found different locks: one began while the other was between looking and making.
            file.unlink(missing_ok=True)
            time.sleep(_POLL_SECONDS * (1 + os.getpid() % 7))
        for each in dead:
            each.unlink(missing_ok=True)
        return file

    def _make(self, file: Path) -> bool:
        """Makes the file; returns False if it exists."""
        began, now = _began(os.getpid()), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        values = {"host": _host(), "sight": _sight(), "pid": os.getpid(), "began": began, "since": now}
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "wb") as stream:
                stream.write(json.dumps(values | {"token": self._token}).encode())
        except OSError:
            file.unlink(missing_ok=True)
            raise
        return True

    def _touch(self) -> None:
        while not self._ending.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a file server that does not answer: others see no touch meanwhile
                if not self._holds():
                    others = " and ".join(map(str, _holders(self._folder))) or "nobody"
                    self._lost = f"the lock was taken away while this process was suspended or cut off; {others} has it"
                    return
                os.utime(self._file)


@contextlib.contextmanager
def locked(folder: Path, deadline: float, option: str) -> Iterator[Lock | None]:
    """Holds the lock of a folder, on process 0 of a job; all processes call it, and all agree on an error.

    Makes the folder if it is missing, and removes it at the end if it is still empty. Once it holds the lock, it
    removes what writers that were killed have left there: files that never got their names.

    Args:
      folder: the folder.
      deadline: as for `Lock`.
      option: what the user names the folder by, for errors.

    Yields:
      The lock; None on other processes.

    Raises:
      ConfigError: another process holds the lock, or the folder cannot be written.
    """
    lock, problem, made = None, "", list[Path]()
    try:
        if processes.index() == 0:
            try:
                made = [each for each in (folder, *folder.parents) if not each.exists()]
                folder.mkdir(parents=True, exist_ok=True)
                lock = Lock(folder, deadline)
                for each in (folder, *filter(Path.is_dir, list(folder.iterdir()))):
                    remove_partial(each)
            except ConfigError as error:
                problem = f"{error}, or choose another {option}"
            except OSError as error:
                problem = f"{folder}: cannot write there ({error.strerror}); choose another {option}"
        agree(problem)
        yield lock
    finally:
        if lock is not None:
            lock.release()
        for each in made:
            with contextlib.suppress(OSError):  # it was not made, or is no longer empty
                each.rmdir()


def agree(problem: str) -> None:
    """Raises `ConfigError` on every process of a job if one of them has a problem; all call it."""
    found = next(filter(None, processes.gather(problem)), None)
    if found:
        raise ConfigError(found)


def refuse_second(folder: Path, option: str) -> None:
    """Raises `ConfigError`, on all processes of a job, if it can be told at once that the folder has an owner."""
    holders = [] if processes.index() else _holders(folder)
    alive = [each for each in holders if each.in_sight() and each.alive()]
    agree(f"{_refusal(folder, alive[0])}, or choose another {option}" if alive else "")


def _dead_owners(folder: Path, deadline: float) -> list[Path]:
    """Returns the files of owners that are dead; waits until that is certain. Raises `ConfigError` for one that lives.

    An owner out of sight lives if its file is touched while this process looks.
    """
    seen: dict[Path, _Holder] = {}
    told = False
    while True:
        waiting, dead = [], []
        for each in _holders(folder):
            first = seen.setdefault(each.file, each)
            if each.in_sight():
                if each.alive():
                    raise ConfigError(_refusal(folder, each))
            elif each.touched_ns != first.touched_ns:
                raise ConfigError(_refusal(folder, each))
            elif _age(each) <= deadline:
                waiting.append(each)
            dead.append(each.file)
        if not waiting:
            return dead
        if not told:
            _log.info("%s: waiting up to %.0f s to see whether %s lives", folder, deadline, waiting[0])
        told = True
        time.sleep(_POLL_SECONDS)


def _refusal(folder: Path, holder: _Holder) -> str:
    return f"{folder}: {holder} writes there; end it first"


def _holders(folder: Path) -> list[_Holder]:
    """Returns the owners that the files in a folder name, the earliest first."""
    try:
        names = sorted((name for name in os.listdir(folder) if _NAME.fullmatch(name)), key=lambda name: len(name))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [holder for name in names if (holder := _holder(folder / name)) is not None]


def _holder(file: Path) -> _Holder | None:
    """Returns the owner that a file names; None if there is no such file."""
    try:
        with open_stream(file) as stream:  # opened, so that a client of NFS asks the server for its time
            touched = os.fstat(stream.fileno()).st_mtime_ns
            content = stream.read(4096)
        values = json.loads(content)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        values = None
    except OSError:  # it is another user's, or no file
        try:
            values, touched = None, file.stat().st_mtime_ns
        except FileNotFoundError:
            return None
    return _Holder(file, None if mismatch(values, _OWNER) else values, touched)


def _age(holder: _Holder) -> float:
    """Returns the seconds since the file was touched, as the file server counts them: by a file made now."""
    probe = holder.file.with_name(f".owner.{uuid.uuid4().hex}.tmp")
    with open(probe, "xb") as stream:
        probe.unlink()
        os.utime(stream.fileno())
        return (os.fstat(stream.fileno()).st_mtime_ns - holder.touched_ns) / 1e9


def _number(file: Path) -> int:
    return int(file.name.rpartition(".")[2])


def _host() -> str:
    return os.uname().nodename


def _sight() -> str:
    """Returns what two processes share that can see each other's ids: the host's boot and the namespace of its ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{_host()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return _host()


def _began(pid: int) -> str:
    """Returns when a process began, in the clock of its host; "" if there is none, or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in ("Z", "X") else fields[19]
    except OSError:  # it is not there, is hidden from other users, or this is no Linux
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return _HIDDEN

"""`vit-dist launch`: so many processes of a verb on this host, run as one job.

One thread does it all in one loop: it reads what the processes print, passes on the signals that it gets, and sees
which of them ends first. A job is as whole as its processes: the first that fails ends the others, and what is started
again is all of them, which go on from the last checkpoint.
"""

import contextlib
import dataclasses
import glob
import os
import random
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from vit_dist.config import ConfigError
from vit_dist.job.child import Child, say
from vit_dist.job.exit_codes import CLEAN, DONE, FAILED, INTERRUPTED, MISTAKE, PREEMPTED
from vit_dist.job.rank import FAKE_DEVICES, LOCAL, VARIABLES
from vit_dist.schema import one_of

VERBS = ("train", "eval", "predict", "bench")  # those that run as several processes
# How long after the first failure the others have to end by themselves, each with its own words (process 0, if it is at
# fault, waits until its peers have gone); then come SIGTERM and SIGKILL, and within ten seconds none is left.
LAST_WORDS_SECONDS = 1.0
GRACE_SECONDS = 6.0
STRAGGLER_SECONDS = 120.0  # for the last to end where others have ended well
LONGEST_PAUSE = 60.0  # seconds before the job is started again; the first time 1, then twice as long each time
_POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Job:
    """What to start. Raises `ConfigError` where it makes no sense.

    devices_per_process: fake CPU devices of each process; None: the real ones, one GPU a process. nodes, node_rank: of
    how many hosts, each with as many processes, this is which. coordinator: host:port at which process 0 of all is
    reached; None, on one host: a free port, another for each start.
    """

    command: tuple[str, ...]
    processes: int
    devices_per_process: int | None = None
    restarts: int = 0
    nodes: int = 1
    node_rank: int = 0
    coordinator: str | None = None

    def __post_init__(self) -> None:
        if self.node_rank >= self.nodes:
            raise ConfigError(
                f"launch --node-rank: {self.node_rank} of {self.nodes} nodes; they are numbered from 0 to --nodes - 1"
            )
        if self.nodes > 1 and self.coordinator is None:
            raise ConfigError(
                "launch --nodes: also give --coordinator=HOST:PORT, an address of node 0, the same on all"
            )
        host, _, port = (self.coordinator or "localhost:1").rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(
                f"launch --coordinator: expected HOST:PORT, such as node0:29500, found {self.coordinator}"
            )

    @property
    def total(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.processes

    @property
    def indices(self) -> range:
        """The processes of this host."""
        return range(self.node_rank * self.processes, (self.node_rank + 1) * self.processes)

    def environment(self, index: int, coordinator: str) -> dict[str, str]:
        """The variables of a process."""
        ours = dict(zip(VARIABLES, (coordinator, str(self.total), str(index))))
        if self.devices_per_process is None:
            return {**os.environ, **ours, LOCAL: str(index - self.indices[0])}
        inherited = {name: value for name, value in os.environ.items() if name != LOCAL}
        return {**inherited, **ours, FAKE_DEVICES: str(self.devices_per_process)}


def verb_command(words: Sequence[str]) -> tuple[str, ...]:
    """The command of a verb and its arguments. Raises `ConfigError` for one that is not run by several processes."""
    if not words:
        raise ConfigError("launch: no verb is given; put it after --, as in: launch --processes=2 -- train --config=F")
    one_of("launch --", words[0], VERBS)
    return (sys.executable, "-m", "vit_dist", *words)


def count_gpus() -> int:
    """The GPUs that a process on this host sees. Raises `ConfigError` where there are none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([one for one in visible.split(",") if one.strip() not in ("", "-1")])
    else:
        try:
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
            count = len(re.findall(r"^GPU \d+:", listed, re.MULTILINE))
        except (OSError, subprocess.TimeoutExpired):
            count = len(glob.glob("/dev/nvidia[0-9]*"))
    if not count:
        raise ConfigError("launch --processes: this host has no GPUs to count; say how many processes to start")
    return count


def launch(job: Job) -> int:
    """Runs the job, again after a crash or a preemption up to `job.restarts` times; returns its exit code.

    0 if all processes end with 0; 2 if one ends with 2, which no restart would mend; 75 if they were preempted and
    have saved; 130 after Ctrl-C; else 1. SIGTERM and Ctrl-C go on to the processes, and then there is no restart.
    """
    asked: list[int] = []
    with _catching(asked):
        for number in range(job.restarts + 1):
            code = _Attempt(job, asked).run()
            if asked or number == job.restarts or code in (DONE, MISTAKE, INTERRUPTED):
                break
            pause = min(2.0**number, LONGEST_PAUSE)
            why = "was preempted" if code == PREEMPTED else "failed"
            say(f"launch: the job {why}; starting again in {pause:g} s (restart {number + 1} of {job.restarts})")
            again = time.monotonic() + pause
            while time.monotonic() < again and not asked:
                time.sleep(_POLL_SECONDS)
            if asked:
                break
    return code


class _Attempt:
    """One start of the processes, until all have ended. `asked`: the signals that the launcher has got so far."""

    def __init__(self, job: Job, asked: list[int]):
        self.job, self.asked = job, asked
        self.children: list[Child] = []
        self.first: Child | None = None  # that has failed
        self._first_at, self._all_ran_at = 0.0, time.monotonic()
        self._passed_on = 0  # of the signals asked
        self._told_to_end = False

    def run(self) -> int:
        """The exit code of the job."""
        coordinator = self.job.coordinator or f"127.0.0.1:{free_port()}"
        with selectors.DefaultSelector() as ready:
            try:
                for index in self.job.indices:
                    environment = self.job.environment(index, coordinator)
                    self.children.append(Child(self.job.command, index, environment, ready))
                while running := [one for one in self.children if one.code is None]:
                    for key, _ in ready.select(_POLL_SECONDS):
                        key.data.read()
                    self._pass_on(running)
                    self._look_for_failures(running)
            finally:
                self._signal(self.children, signal.SIGKILL)
                for child in self.children:
                    child.process.wait()
        return self._conclude()

    def _pass_on(self, running: Sequence[Child]) -> None:
        for number in self.asked[self._passed_on :]:
            self._signal(running, signal.SIGKILL if self._insisted() else number)
        self._passed_on = len(self.asked)

    def _look_for_failures(self, running: Sequence[Child]) -> None:
        failed = [one for one in running if one.ended() and not self._ended_well(one)]
        if failed and self.first is None:
            self.first, self._first_at = min(failed, key=Child.innocence), time.monotonic()
            if any(one.code is None for one in running) and not self._was_stopped(self.first):
                say(f"launch: {self._name(self.first)} {self.first.how()}; ending the others")
        if self.first is None:
            self._look_for_stragglers([one for one in running if one.code is None])
            return
        ago = time.monotonic() - self._first_at
        if ago > GRACE_SECONDS:
            self._signal(running, signal.SIGKILL)
        elif ago > LAST_WORDS_SECONDS and not self._told_to_end:
            self._signal(running, signal.SIGTERM)
            self._told_to_end = True

    def _look_for_stragglers(self, running: Sequence[Child]) -> None:
        """Kills those that stay when others have ended well: all leave the job together, and have no more to do."""
        if len(running) == len(self.children):
            self._all_ran_at = time.monotonic()
        elif running and time.monotonic() - self._all_ran_at > STRAGGLER_SECONDS:
            self._signal(running, signal.SIGKILL)

    @staticmethod
    def _signal(children: Sequence[Child], number: int) -> None:
        for child in children:
            child.signal(number)

    def _insisted(self) -> bool:
        return self.asked.count(signal.SIGINT) > 1  # the second Ctrl-C will not wait

    def _ended_well(self, child: Child) -> bool:
        """Whether it has ended as all of its job do: after a Ctrl-C that was passed on, too, when it has saved."""
        return child.code in CLEAN or (child.code == INTERRUPTED and signal.SIGINT in self.asked)

    def _was_stopped(self, child: Child) -> bool:
        """Whether it has ended only because the launcher was asked to."""
        return bool(self.asked) and (self._insisted() or child.code in (INTERRUPTED, *(-one for one in self.asked)))

    def _conclude(self) -> int:
        codes = [child.code for child in self.children]
        if self.first is None:
            return next((code for code in (INTERRUPTED, PREEMPTED) if code in codes), DONE)
        if self._was_stopped(self.first):
            say("launch: stopped before all had saved")
        else:
            self._say_who_failed(self.first)
        if MISTAKE in codes:
            return MISTAKE
        return INTERRUPTED if signal.SIGINT in self.asked or self.first.code == INTERRUPTED else FAILED

    def _say_who_failed(self, first: Child) -> None:
        """Blames the first that failed, unless that has blamed another process."""
        blame = first.blame
        blamed = next((one for one in self.children if blame and one.index == blame.index), None)
        if blame and blamed is None:  # it ran on another host
            say(f"error: {blame.reason}; so says {self._name(first)}, which {first.how()}")
            return
        blamed = blamed or first
        witness = "" if blamed is first or blame is None else f"; of it process {first.index} said: {blame.reason}"
        said = "".join(f"\n    {line}" for line in blamed.tail) or " nothing"
        say(f"error: {self._name(blamed)} {blamed.how()}{witness}; the last that it said:{said}")

    def _name(self, child: Child) -> str:
        return f"process {child.index} of {self.job.total} (on {socket.gethostname()}, pid {child.process.pid})"


@contextlib.contextmanager
def _catching(asked: list[int]) -> Iterator[None]:
    """Lists the signals that ask the launcher to stop, a terminal's end among them unless it was to be ignored."""

    def note(number: int, frame: object) -> None:
        number = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if number == signal.SIGINT or number not in asked:
            asked.append(number)

    caught = [one for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]
    before = {one: signal.signal(one, note) for one in caught}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def free_port() -> int:
    """A port of this host that nobody listens at, below those that the kernel gives to outgoing connections."""
    for port in random.sample(range(20000, 32768), 100):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("", port))
            return port
    raise ConfigError("launch: no free port was found from 20000 to 32767; give one by --coordinator=localhost:PORT")

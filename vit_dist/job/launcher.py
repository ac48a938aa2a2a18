"""`vit-dist launch`: runs a verb as several processes on this host, as one job.

A single thread runs one loop: it prints the output of the processes, forwards the signals that it receives, and checks
which process ends first. The first process that fails ends the others. A restart starts all of them again, and they
resume from the last checkpoint.
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
from vit_dist.job import signals
from vit_dist.job.child import Child, print_line
from vit_dist.job.exit_codes import CLEAN, DONE, FAILED, INTERRUPTED, MISTAKE, PREEMPTED
from vit_dist.job.rank import FAKE_DEVICES, LOCAL, VARIABLES, is_address
from vit_dist.job.secret import VARIABLE as SECRET
from vit_dist.job.secret import new_secret
from vit_dist.job.signals import VERBS
from vit_dist.schema import one_of

# After the first failure the others may end by themselves, each with its own message (process 0, if it is at fault,
# waits until its peers have ended). Those that still run get SIGTERM, then SIGKILL, so long after the failure.
SIGTERM_SECONDS = 1.0
SIGKILL_SECONDS = 6.0
STRAGGLER_SECONDS = 120.0  # for the last process to end when others have ended without a failure
LONGEST_PAUSE = 60.0  # seconds before a restart; 1 before the first, then twice as long each time
_POLL_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Job:
    """What to start.

    Attributes:
      command: the command of each process.
      processes: how many to start on this host.
      devices_per_process: fake CPU devices of each process; None: the real ones, one GPU for each process.
      restarts: how often to start again after a crash or a preemption.
      nodes: hosts of the job, each with as many processes.
      node_rank: which of them this host is.
      coordinator: host:port where process 0 of the job listens; None, on one host: a free port, another for each start.

    Raises:
      ConfigError: for values that contradict each other.
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
                f"launch --node-rank: expected 0 to {self.nodes - 1} (--nodes - 1), found {self.node_rank}"
            )
        if self.nodes > 1 and self.coordinator is None:
            raise ConfigError(
                "launch --nodes: also give --coordinator=HOST:PORT, an address of node 0, the same on all"
            )
        if self.coordinator is not None and not is_address(self.coordinator):
            raise ConfigError(
                f"launch --coordinator: expected HOST:PORT, such as node0:29500, found {self.coordinator}"
            )

    @property
    def total(self) -> int:
        """The number of processes on all nodes."""
        return self.nodes * self.processes

    @property
    def indices(self) -> range:
        """The numbers of this host's processes within the job."""
        return range(self.node_rank * self.processes, (self.node_rank + 1) * self.processes)

    def environment(self, index: int, coordinator: str, secret: str) -> dict[str, str]:
        """Returns the environment variables of process `index`."""
        rank = dict(zip(VARIABLES, (coordinator, str(self.total), str(index)))) | ({SECRET: secret} if secret else {})
        if self.devices_per_process is None:
            return {**os.environ, **rank, LOCAL: str(index - self.indices[0])}
        inherited = {name: value for name, value in os.environ.items() if name != LOCAL}
        return {**inherited, **rank, FAKE_DEVICES: str(self.devices_per_process)}


def verb_command(words: Sequence[str]) -> tuple[str, ...]:
    """Returns the command of a verb and its arguments. Raises `ConfigError` for a verb that runs as one process."""
    if not words:
        raise ConfigError("launch: no verb is given; put it after --, as in: launch --processes=2 -- train --config=F")
    one_of("launch --", words[0], VERBS)
    return (sys.executable, "-m", "vit_dist", *words)


def count_gpus() -> int:
    """Returns the number of GPUs that a process on this host sees. Raises `ConfigError` if there are none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    else:
        try:
            output = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
            count = len(re.findall(r"^GPU \d+:", output, re.MULTILINE))
        except (OSError, subprocess.TimeoutExpired):
            count = len(glob.glob("/dev/nvidia[0-9]*"))
    if not count:
        raise ConfigError("launch --processes: this host has no GPUs to count; say how many processes to start")
    return count


def launch(job: Job) -> int:
    """Runs the job, and restarts it after a crash or a preemption up to `job.restarts` times.

    SIGTERM and Ctrl-C are forwarded to the processes; after either there is no restart.

    Returns:
      The exit code: 0 if all processes end with 0; 2 if a process ends with 2, which no restart would fix; 75 if they
      were preempted and have saved; 130 after Ctrl-C; else 1.
    """
    received: list[int] = []
    with _record_signals(received):
        for number in range(job.restarts + 1):
            code = _Attempt(job, received).run()
            if received or number == job.restarts or code in (DONE, MISTAKE, INTERRUPTED):
                break
            pause = min(2.0**number, LONGEST_PAUSE)
            why = "was preempted" if code == PREEMPTED else "failed"
            print_line(f"launch: the job {why}; starting again in {pause:g} s (restart {number + 1} of {job.restarts})")
            restart_at = time.monotonic() + pause
            while time.monotonic() < restart_at and not received:
                time.sleep(_POLL_SECONDS)
            if received:
                return signals.code_of(set(received))  # another start goes on from the last save
    return code


class _Attempt:
    """One start of the processes, until all have ended. `received`: the signals that the launcher has got so far."""

    def __init__(self, job: Job, received: list[int]):
        self.job, self.received = job, received
        self.children: list[Child] = []
        self.first_failed: Child | None = None  # the first child that failed
        self._first_at, self._all_ran_at = 0.0, time.monotonic()
        self._forwarded = 0  # how many of the signals received
        self._sent_sigterm = False

    def run(self) -> int:
        """Returns the exit code of the job."""
        coordinator = self.job.coordinator or f"127.0.0.1:{free_port()}"
        # The launchers of several nodes cannot know one that this one makes; see `secret`.
        secret = os.environ.get(SECRET, "") or (new_secret() if self.job.nodes == 1 else "")
        with selectors.DefaultSelector() as ready:
            try:
                for index in self.job.indices:
                    environment = self.job.environment(index, coordinator, secret)
                    self.children.append(Child(self.job.command, index, environment, ready))
                while running := [child for child in self.children if child.code is None]:
                    for key, _ in ready.select(_POLL_SECONDS):
                        key.data.read()
                    self._forward_signals(running)
                    self._look_for_failures(running)
            finally:
                self._signal(self.children, signal.SIGKILL)
                for child in self.children:
                    child.process.wait()
                    child.poll()  # closes its pipes
                is_shared = self._print_usage_errors()
        return MISTAKE if is_shared else self._conclude()

    def _forward_signals(self, running: Sequence[Child]) -> None:
        while self._forwarded < len(self.received):  # one by one: another may arrive meanwhile
            number = self.received[self._forwarded]
            self._forwarded += 1
            self._signal(running, signal.SIGKILL if self._second_ctrl_c() else number)

    def _look_for_failures(self, running: Sequence[Child]) -> None:
        failed = [child for child in running if child.poll() and not self._ended_well(child)]
        if failed and self.first_failed is None:
            self.first_failed, self._first_at = min(failed, key=Child.blame_order), time.monotonic()
            others_run = any(child.code is None for child in running)
            if others_run and self.first_failed.code != MISTAKE and not self._was_stopped(self.first_failed):
                print_line(
                    f"launch: {self._name(self.first_failed)} {self.first_failed.describe_end()}; ending the others"
                )
        if self.first_failed is None:
            self._look_for_stragglers([child for child in running if child.code is None])
            return
        elapsed = time.monotonic() - self._first_at
        if elapsed > SIGKILL_SECONDS:
            self._signal(running, signal.SIGKILL)
        elif elapsed > SIGTERM_SECONDS and not self._sent_sigterm:
            self._signal(running, signal.SIGTERM)
            self._sent_sigterm = True

    def _look_for_stragglers(self, running: Sequence[Child]) -> None:
        """Kills processes that run on for long after others have ended well: all leave the job together."""
        if len(running) == len(self.children):
            self._all_ran_at = time.monotonic()
        elif running and time.monotonic() - self._all_ran_at > STRAGGLER_SECONDS:
            self._signal(running, signal.SIGKILL)

    @staticmethod
    def _signal(children: Sequence[Child], number: int) -> None:
        for child in children:
            child.signal(number)

    def _second_ctrl_c(self) -> bool:
        return self.received.count(signal.SIGINT) > 1  # it does not wait for a save

    def _ended_well(self, child: Child) -> bool:
        """Returns whether the process did not fail; after Ctrl-C, a process that has saved ends with 130."""
        if child.code in CLEAN or self._was_stopped_at_birth(child):
            return True
        return child.code == INTERRUPTED and signal.SIGINT in self.received

    def _was_stopped_at_birth(self, child: Child) -> bool:
        """Returns whether a forwarded SIGTERM ended the process, as it does before the first line of `main`."""
        return child.code == -signal.SIGTERM and signal.SIGTERM in self.received

    def _was_stopped(self, child: Child) -> bool:
        """Returns whether the process ended only because the launcher was told to stop."""
        stopping = (INTERRUPTED, *(-number for number in self.received))
        return bool(self.received) and (self._second_ctrl_c() or child.code in stopping)

    def _print_usage_errors(self) -> bool:
        """Prints the `error:` lines of processes that ended with code 2; returns whether all ended with the same one.

        It is then printed once, without a number. Processes that the launcher ended, perhaps before they reached the
        error, do not count.
        """
        errors = {child.stderr.error for child in self.children if child.code == MISTAKE}
        others = {child.code for child in self.children} - {MISTAKE, -signal.SIGTERM, -signal.SIGKILL}
        first = self.first_failed
        if first and first.code == MISTAKE and not others and len(errors) == 1 and "" not in errors:
            print_line(errors.pop())
            return True
        for child in self.children:
            child.stderr.finish()
        return False

    def _conclude(self) -> int:
        """Prints why the job failed, if it did; returns its exit code."""
        codes = [child.code for child in self.children]
        if self.first_failed is None:
            stopped = any(map(self._was_stopped_at_birth, self.children))
            return next((code for code in (INTERRUPTED, PREEMPTED) if code in codes), PREEMPTED if stopped else DONE)
        if self._was_stopped(self.first_failed):
            print_line("launch: stopped before all had saved")
        else:
            self._report_failure(self.first_failed)
        if MISTAKE in codes:
            return MISTAKE
        return INTERRUPTED if signal.SIGINT in self.received or self.first_failed.code == INTERRUPTED else FAILED

    def _report_failure(self, first: Child) -> None:
        """Blames the first process that failed, or the process that this one has blamed."""
        blame = first.blame
        blamed = next((child for child in self.children if blame and child.index == blame.index), None)
        if blame and blamed is None:  # it ran on another host
            print_line(f"error: {blame.reason}; reported by {self._name(first)}, which {first.describe_end()}")
            return
        blamed = blamed or first
        report = "" if blamed is first or blame is None else f"; process {first.index} reported: {blame.reason}"
        output = "".join(f"\n{line}" for line in blamed.tail) or " nothing"
        print_line(f"error: {self._name(blamed)} {blamed.describe_end()}{report}; its last output:{output}")

    def _name(self, child: Child) -> str:
        return f"process {child.index} of {self.job.total} (on {socket.gethostname()}, pid {child.process.pid})"


@contextlib.contextmanager
def _record_signals(received: list[int]) -> Iterator[None]:
    """Appends the signals that tell the launcher to stop, SIGHUP as SIGTERM; signals that were ignored stay ignored."""

    def record(number: int, frame: object) -> None:
        number = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        if number == signal.SIGINT or number not in received:
            received.append(number)

    stopping = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    caught = [number for number in stopping if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, record) for number in caught}
    signals.hand_to(None)  # the job ends once its processes have
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def free_port() -> int:
    """Returns a port of this host that nobody listens at, below those that the kernel uses for outgoing connections."""
    for port in random.sample(range(20000, 32768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
    raise ConfigError("launch: no free port was found from 20000 to 32767; give one by --coordinator=localhost:PORT")

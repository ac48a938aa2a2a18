"""How a process joins the others of its job, agrees with them on values, and leaves.

A single process needs nothing. Several get their ranks from `rank` and connect by `rendezvous`. When one of them is
lost, `watchdog` ends those that are left, so that every wait for another process has an end.
"""

import hashlib
import logging
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import jax

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.escape import printable
from vit_dist.job import rank as ranks
from vit_dist.job import signals
from vit_dist.job.exit_codes import INTERRUPTED
from vit_dist.job.listening import bind_host, joined
from vit_dist.job.rendezvous import rendezvous
from vit_dist.job.secret import VARIABLE, find_secret
from vit_dist.job.signals import end_now
from vit_dist.job.watchdog import Watchdog

# XLA ends a process that waits 40 s in a CPU collective. Eight fake devices on two busy cores can wait longer.
COLLECTIVE_TIMEOUT = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
EXTRA_THREADS = 2  # for each fake device; see `make_fake_devices`

# The beginnings of errors of compiled code that a lost peer may have caused (out of memory is not among them). Not all
# such errors have a type of their own.
_LOST_PEER = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION): ")

_log = logging.getLogger(__name__)
_watchdog: Watchdog | None = None


def start(fake_devices: int = 0, deadlines: config.Deadlines | None = None, *, workdir: Path | None = None) -> None:
    """Makes the devices and joins the other processes, if there are any.

    It must be called before anything else uses jax's devices; a later call does nothing.

    Args:
      fake_devices: CPU devices to make; 0: the real devices.
      deadlines: when a wait for other processes times out.
      workdir: that of the run, where the job's secret may be; see `secret`.

    Raises:
      ConfigError: if an environment variable is missing, is not a number or is out of range, and if the process has
        joined a job by other means.
      JobError: names the processes that did not connect in time.
    """
    global _watchdog
    fake = ranks.fake_devices(fake_devices)
    if fake:
        make_fake_devices(fake)
    if _watchdog is not None:
        return
    if jax.distributed.is_initialized():  # without our connections no lost peer is noticed, and no value compared
        raise ConfigError(
            "jax.distributed.initialize: this process has joined its job by itself; leave that to vit_dist, which "
            f"reads the cluster's own variables or {', '.join(ranks.VARIABLES)}"
        )
    deadlines = deadlines or config.Deadlines()
    rank = ranks.find_rank(deadlines.start_seconds)
    if rank is None:
        signals.alone()
        return
    secret = find_secret(workdir)
    if not secret and rank.index == 0:
        _log.warning("%s: not set, so that whoever reaches %s may join this job", VARIABLE, rank.coordinator)
    peers = rendezvous(rank, deadlines.start_seconds, secret)
    _watchdog = Watchdog(rank.index, peers, deadlines)
    signals.hand_to(_watchdog.ask_to_stop)
    jax.config.update("jax_enable_preemption_service", False)  # it would answer SIGTERM, in C++
    jax.distributed.initialize(
        rank.coordinator,
        rank.count,
        rank.index,
        list(rank.devices),  # not None, or JAX would try to detect a cluster again
        initialization_timeout=deadlines.start_seconds,
        # jax would listen at all addresses of the host.
        coordinator_bind_address=joined(bind_host(rank), rank.address[1]) if rank.index == 0 else None,
        # Our own watchdog acts first and names the lost process; JAX's ends the process with a list of C++ functions.
        heartbeat_timeout_seconds=3 * deadlines.peer_seconds + 60,
        shutdown_timeout_seconds=deadlines.step_seconds,
    )
    jax.devices()  # waits for the devices of all processes: now, not after one process has read a large data set


def make_fake_devices(count: int) -> None:
    """Makes `count` CPU devices of this process and leaves accelerators alone; joins no job.

    It must be called before anything else uses jax's devices. Raises `ConfigError` if something has.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if COLLECTIVE_TIMEOUT not in flags:
        os.environ["XLA_FLAGS"] = f"{COLLECTIVE_TIMEOUT} {flags}".strip()
    # A collective blocks a thread of XLA's pool until every device has reached it. The pool has one thread for each
    # core, so with few cores the waiting devices can occupy all threads and the last device never gets one: a deadlock,
    # observed on two cores with two devices and with eight. Extra threads for each device prevent it.
    os.environ.setdefault("PJRT_NPROC", str((os.cpu_count() or 1) + EXTRA_THREADS * count))
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:  # the backend runs already, with another number of devices
        raise ConfigError(
            f"fake_devices: {count} asked for, but jax already runs with {jax.device_count()} devices; "
            "start a new process"
        ) from error


def alive(step: int | None = None) -> None:
    """Restarts the watchdog's clock: this process has begun `step`, or (None) the next stage of the current step."""
    if _watchdog is not None:
        _watchdog.alive(step)


def stop_clock() -> None:
    """Stops the clock that `alive` starts: what follows may take any time."""
    if _watchdog is not None:
        _watchdog.stop_clock()


def index() -> int:
    """Returns the number of this process in its job. Unlike `jax.process_index`, it starts no backend."""
    return 0 if _watchdog is None else _watchdog.index


def check_same(what: str, text: str) -> None:
    """Raises `ConfigError` on every process if `text`, which describes `what`, differs between processes."""
    digests = gather(hashlib.sha256(text.encode()).hexdigest())
    others = [index for index, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise ConfigError(f"{what}: not the same on process 0 and {', '.join(map(str, others))}; start them all alike")


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in the order of their numbers. Every process must make the same call.

    `value` is anything that JSON can hold. It is sent over the connections of `rendezvous`, not as a collective:
    devices give up waiting, gloo after 30 s, while one host still reads a large index that another has cached.
    """
    return [value] if _watchdog is None else _watchdog.gather(value)


def agreed_to_stop(number: int | None) -> bool:
    """Returns whether all processes of a job of several stop here; each must call it equally often.

    `number` is that of a signal that this process has received; None: of none.
    """
    assert _watchdog is not None
    if number is not None:
        _watchdog.ask_to_stop(number)
    return _watchdog.agreed_to_stop()


def stopped_by_user() -> bool:
    """Returns whether a process received Ctrl-C before all agreed to stop."""
    return _watchdog is not None and _watchdog.stop_code() == INTERRUPTED


def compile_together(compiled: Any, *arguments: Any) -> None:
    """Compiles a function, which `jax.jit` made, before its first call, and waits until all processes have compiled it.

    Processes compile at different speeds, and the first collective of a program times out: gloo's after 30 s. No
    deadline of a step counts meanwhile: a large model compiles for longer than it steps.
    """
    if jax.process_count() > 1:
        stop_clock()
        compiled.lower(*arguments).compile()
        gather(None)
        alive()


def leave(code: int, text: str, *, together: bool) -> None:
    """Leaves the job, if there is one.

    Args:
      code: the exit code with which the process ends.
      text: the message with which it ends.
      together: whether all processes of the job end in this way; the call then waits for all. Otherwise this process
        fails and reports `text` to the others; the exception being handled, if there is one, is printed.
    """
    global _watchdog
    if _watchdog is None:
        return
    if together:
        _watchdog.stop_clock()
        jax.distributed.shutdown()  # waits until all processes have called it
        _watchdog.stop()
        _watchdog = None
        return
    error = sys.exception()
    if error is not None and _LOST_PEER.match(str(error)):
        first_line = str(error).partition("\n")[0]
        print(f"checking whether another process was lost: {printable(first_line)}", file=sys.stderr, flush=True)
        _watchdog.wait_for_verdict()
    if error is not None:
        traceback.print_exception(error)
    _watchdog.report_failure(text, code)
    end_now(code)

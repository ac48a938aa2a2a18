"""How a process joins the others of its job, tells them what they need to agree on, and leaves.

One process alone needs nothing. Several know their ranks by `rank`, meet by `rendezvous`, and from then on `watchdog`
ends those that are left when one of them is lost: no wait for another process is without an end.
"""

import hashlib
import os
import re
import sys
import traceback
from typing import Any

import jax

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.job import rank as ranks
from vit_dist.job.rendezvous import rendezvous
from vit_dist.job.watchdog import Watchdog, end_now

# XLA ends a process whose CPU collective waits longer than 40 s, which eight fake devices on two busy cores can.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
THREADS_A_DEVICE = 2  # see `pretend`

# How an error of compiled code begins that may be the effect of a lost peer. (Running out of memory is none.) Not all
# such errors have a type of their own.
_LOST_PEER = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION): ")

_watchdog: Watchdog | None = None


def start(
    fake_devices: int = 0, deadlines: config.Deadlines | None = None, *, saves_when_asked_to_stop: bool = False
) -> None:
    """Makes `fake_devices` CPU devices (0: the real ones) and joins the other processes, if there are any.

    Must come before anything else asks jax for devices; a later call does nothing. saves_when_asked_to_stop: SIGTERM
    is answered by `preemption.StopRequest`; else it ends the process. Raises `ConfigError` for variables that make no
    sense and for a job joined without it, and `JobError` naming the processes that did not come in time.
    """
    global _watchdog
    fake = ranks.fake_devices(fake_devices)
    if fake:
        pretend(fake)
    if _watchdog is not None:
        return
    if jax.distributed.is_initialized():  # the others could not be heard, and what they should agree on not be compared
        raise ConfigError(
            "jax.distributed.initialize: this process has joined its job by itself; leave that to vit_dist, which "
            f"reads what the cluster says or {', '.join(ranks.VARIABLES)}"
        )
    deadlines = deadlines or config.Deadlines()
    rank = ranks.find_rank(deadlines.start_seconds)
    if rank is None:
        return
    _watchdog = Watchdog(rank.index, rendezvous(rank, deadlines.start_seconds), deadlines)
    jax.config.update("jax_enable_preemption_service", saves_when_asked_to_stop)
    jax.distributed.initialize(
        rank.coordinator,
        rank.count,
        rank.index,
        list(rank.devices),  # not None, or JAX would look for a cluster again
        initialization_timeout=deadlines.start_seconds,
        # Our own watchdog comes first, and says who was lost; JAX's ends the process with a list of C++ functions.
        heartbeat_timeout_seconds=3 * deadlines.peer_seconds + 60,
        shutdown_timeout_seconds=deadlines.step_seconds,
    )
    jax.devices()  # here they learn of each other's, and wait; not after one has read a large set and another not


def pretend(fake_devices: int) -> None:
    """Makes `fake_devices` CPU devices of this process and leaves accelerators alone; joins nobody.

    Must come before anything else asks jax for devices. Raises `ConfigError` where something has.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if PATIENCE not in flags:
        os.environ["XLA_FLAGS"] = f"{PATIENCE} {flags}".strip()
    # A collective blocks a thread of XLA's pool until every device has come to it. The pool has a thread a core, so on
    # few cores the waiting devices can hold them all and the last device never gets one: a deadlock, seen on two cores
    # with two devices and with eight. With threads to spare for each device it cannot happen.
    os.environ.setdefault("PJRT_NPROC", str((os.cpu_count() or 1) + THREADS_A_DEVICE * fake_devices))
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", fake_devices)
    except RuntimeError as error:  # the backend runs already, with some other number
        raise ConfigError(
            f"fake_devices: {fake_devices} asked for, but jax already runs with {jax.device_count()} devices; "
            "start a new process"
        ) from error


def alive(step: int | None = None) -> None:
    """Tells the watchdog of a job that this process has begun `step`, or (None) another part of the one it is at."""
    if _watchdog is not None:
        _watchdog.alive(step)


def rest() -> None:
    """Stops the clock that `alive` starts: what comes now may take as long as it likes."""
    if _watchdog is not None:
        _watchdog.rest()


def index() -> int:
    """Which process of its job this is; unlike `jax.process_index`, it starts no backend."""
    return 0 if _watchdog is None else _watchdog.index


def check_same(what: str, text: str) -> None:
    """Raises `ConfigError` on every process where `text` is not the same on all of them; `what` it describes."""
    everyone = gather(hashlib.sha256(text.encode()).hexdigest())
    others = [index for index, other in enumerate(everyone) if other != everyone[0]]
    if others:
        raise ConfigError(f"{what}: not the same on process 0 and {', '.join(map(str, others))}; start them all alike")


def gather(value: Any) -> list[Any]:
    """What JSON can hold -> the value of each process, in their order. All must call it, at the same place.

    It goes over the connections of `rendezvous`, for devices give up waiting: gloo after 30 s, when one host reads a
    large index and another has it at hand.
    """
    return [value] if _watchdog is None else _watchdog.gather(value)


def leave(code: int, text: str, *, together: bool) -> None:
    """Leaves the job, if there is one.

    Args:
      code: the exit code with which the process ends.
      text: what it has said of its end.
      together: all processes of the job end so, and are waited for; else this one fails, and tells the others why.
        It is then called with the exception under way, if there is one.
    """
    global _watchdog
    if _watchdog is None:
        return
    if together:
        _watchdog.rest()
        jax.distributed.shutdown()  # waits until all have come here
        _watchdog.stop()
        _watchdog = None
        return
    error = sys.exception()
    if error is not None and _LOST_PEER.match(str(error)):
        first_line = str(error).partition("\n")[0]
        print(f"waiting to hear whether another process was lost: {first_line}", file=sys.stderr, flush=True)
        _watchdog.wait_for_verdict()
    if error is not None:
        traceback.print_exception(error)
    _watchdog.report_failure(text, code)
    end_now(code)

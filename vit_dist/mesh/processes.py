"""How a process joins the others of its job, and how it leaves.

One process alone needs nothing. Several find each other by three variables, `VIT_DIST_COORDINATOR` (host:port of the
first), `VIT_DIST_PROCESSES` (how many) and `VIT_DIST_PROCESS` (which one this is).
"""

import hashlib
import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vit_dist.config import ConfigError

VARIABLES = ("VIT_DIST_COORDINATOR", "VIT_DIST_PROCESSES", "VIT_DIST_PROCESS")
# XLA ends a process whose CPU collective waits longer than 40 s, which eight fake devices on two busy cores can.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
THREADS_A_DEVICE = 2  # see `_pretend`
START_SECONDS = 120  # how long to wait for the others at the start


def start(fake_devices: int = 0) -> None:
    """Makes `fake_devices` CPU devices (0: the real ones) and joins the other processes, if there are any.

    Must come before anything else asks jax for devices. Raises `ConfigError` for variables that make no sense.
    """
    if fake_devices:
        _pretend(fake_devices)
    values = [os.environ.get(name) for name in VARIABLES]
    if not any(values):
        return
    found = ", ".join(f"{name}={value or '(unset)'}" for name, value in zip(VARIABLES, values, strict=True))
    coordinator, count, index = values
    if not coordinator or not count or not index or not count.isdecimal() or not index.isdecimal():
        raise ConfigError(f"{found}: all three must be set, the last two to whole numbers")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"{found}: {VARIABLES[0]} must be host:port, such as localhost:12345")
    if int(index) >= int(count):
        raise ConfigError(
            f"{found}: processes are numbered from 0, so the last one's number is below how many there are"
        )
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(coordinator, int(count), int(index), initialization_timeout=START_SECONDS)


def check_same(what: str, text: str) -> None:
    """Raises `ConfigError` on every process where `text` is not the same on all of them; `what` it describes."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    everyone = multihost_utils.process_allgather(digest)
    others = [index for index, other in enumerate(everyone) if not np.array_equal(other, everyone[0])]
    if others:
        raise ConfigError(f"{what}: not the same on process 0 and {', '.join(map(str, others))}; start them all alike")


def gather(value: Any) -> list[Any]:
    """What JSON can hold -> the value of each process, in their order. All must call it, at the same place."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(text)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(one[:size].tobytes()) for one, size in zip(texts, sizes, strict=True)]


def stop() -> None:
    """Leaves the job; only after a clean end, since the others wait here for this process."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def _pretend(fake_devices: int) -> None:
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

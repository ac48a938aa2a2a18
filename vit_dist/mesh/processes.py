"""How a process joins the others of its job, and how it leaves.

One process alone needs nothing. Several find each other by three variables, `VIT_DIST_COORDINATOR` (host:port of the
first), `VIT_DIST_PROCESSES` (how many) and `VIT_DIST_PROCESS` (which one this is).
"""

import os

import jax

from vit_dist.config import ConfigError

VARIABLES = ("VIT_DIST_COORDINATOR", "VIT_DIST_PROCESSES", "VIT_DIST_PROCESS")
# XLA ends a process whose CPU collective waits longer than 40 s, which eight fake devices on two busy cores can.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"
START_SECONDS = 120  # how long to wait for the others at the start


def start(fake_devices: int = 0) -> None:
    """Makes `fake_devices` CPU devices (0: the real ones) and joins the other processes, if there are any.

    Must come before anything else asks jax for devices. Raises `ConfigError` for variables that make no sense.
    """
    if fake_devices:
        os.environ["XLA_FLAGS"] = f"{PATIENCE} {os.environ.get('XLA_FLAGS', '')}".strip()
        try:
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_num_cpu_devices", fake_devices)
        except RuntimeError as error:  # the backend runs already, with some other number
            raise ConfigError(
                f"fake_devices: {fake_devices} asked for, but jax already runs with {jax.device_count()} devices; "
                "start a new process"
            ) from error
    values = [os.environ.get(name) for name in VARIABLES]
    if not any(values):
        return
    coordinator, count, index = values
    if not coordinator or not count or not index or not count.isdigit() or not index.isdigit():
        found = ", ".join(f"{name}={value}" for name, value in zip(VARIABLES, values, strict=True))
        raise ConfigError(f"{found}: all three must be set, the last two to whole numbers")
    if not jax.distributed.is_initialized():
        jax.distributed.initialize(coordinator, int(count), int(index), initialization_timeout=START_SECONDS)


def stop() -> None:
    """Leaves the job; only after a clean end, since the others wait here for this process."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()

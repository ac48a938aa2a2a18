"""One process of a job that only waits for its peers, for tests of what happens when one of them fails.

    python peer.py WHAT INDEX, with the environment variables of the job

The process with that index does one of `FAULTS` while the others wait for it forever; or, for "linger", it waits before
its first step; for any other WHAT all end without a failure.
"""

import os
import signal
import sys
import time

import jax

from vit_dist.config import ConfigError, Deadlines
from vit_dist.job import processes
from vit_dist.job.rendezvous import JobError


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def fail():
    raise ConfigError("data.path: this host has no such folder")


def crash():
    raise ZeroDivisionError("a mistake in the program")


def exhaust():
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 80 GiB")


def sleep():
    time.sleep(1000)


FAULTS = {"die": die, "stop": stop, "fail": fail, "crash": crash, "exhaust": exhaust, "sleep": sleep}


def main(what, at_fault):
    deadlines = Deadlines(start_seconds=int(os.environ.get("START_SECONDS", "60")), peer_seconds=8, step_seconds=8)
    code, text = 1, "an unexpected error"
    try:
        processes.start(1, deadlines)
        if what == "linger" and processes.index() == at_fault:
            time.sleep(deadlines.step_seconds + 3)  # opening its data; no step has begun yet
        processes.gather("all have started")
        processes.alive(1)
        print("started", flush=True)
        if processes.index() == at_fault:
            FAULTS.get(what, lambda: None)()
        else:
            processes.alive(2)
        processes.gather("all have done their step")
        code = 0
    except ConfigError as error:
        code, text = 2, str(error)
        print(f"error: {error}", file=sys.stderr)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        processes.leave(code, text, together=code == 0)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))

"""One process of a job that only waits for its peers, for tests of what happens when one of them does not come.

python part.py WHAT, with the variables of the job; the last process does WHAT, the others wait for it for ever
"""

import os
import signal
import sys
import time

from vit_dist.config import ConfigError, Deadlines
from vit_dist.mesh import processes
from vit_dist.mesh.peers import JobError


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def fail():
    raise ConfigError("data.path: this host has no such folder")


def crash():
    raise ZeroDivisionError("a mistake in the program")


def sleep():
    time.sleep(1000)


def main(what, at_fault):
    deadlines = Deadlines(start_seconds=int(os.environ.get("START_SECONDS", "60")), peer_seconds=4, step_seconds=5)
    code, said = 1, "an error of the program"
    try:
        processes.start(1, deadlines)
        processes.alive(1)
        processes.gather("all are here")
        print("here", flush=True)
        if processes.index() == at_fault:
            {"die": die, "stop": stop, "fail": fail, "crash": crash, "sleep": sleep, "end": lambda: None}[what]()
        else:
            processes.alive(2)
        processes.gather("and again")
        code = 0
    except ConfigError as error:
        code, said = 2, str(error)
        print(f"error: {error}", file=sys.stderr)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
    finally:
        processes.leave(code, said)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))

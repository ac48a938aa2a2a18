"""Worker processes do not outlive the process that they work for."""

import contextlib
import os
import signal
import subprocess
import sys

import psutil
import pytest
from pids import wait_until_gone
from system import started, until

TASK = """
import pathlib, sys
from vit_dist.data.stream.workers import Workers

def count(number):
    pathlib.Path(sys.argv[0]).with_name(f"begun-{number}").touch()
    sum(range(10**12))  # hours in C, which hold Python's lock

if __name__ == "__main__":
    next(Workers(count, 2, 2, 2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker ends when its task lets go of Python's lock")
def test_workers_in_a_long_task_end_with_a_parent_that_is_killed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TASK)
    with started([sys.executable, str(script)], tmp_path / "output", start_new_session=True) as running:
        try:
            until(lambda: len(list(tmp_path.glob("begun-*"))) == 2, running, 60)
            workers = [child.pid for child in psutil.Process(running.process.pid).children()]
            running.process.send_signal(signal.SIGKILL)
            assert running.wait(10) == -signal.SIGKILL
            assert len(workers) >= 2
            wait_until_gone(workers, 20)
        finally:
            with contextlib.suppress(ProcessLookupError):  # none is left
                os.killpg(running.process.pid, signal.SIGKILL)


PARENT_THAT_HAS_ENDED = """
import multiprocessing, os, threading, types
from vit_dist.data.stream import workers

sentinel, kept_by_parent = os.pipe()
os.close(kept_by_parent)
never = threading.Event().wait  # as for a thread that does not get Python's lock
multiprocessing.parent_process = lambda: types.SimpleNamespace(sentinel=sentinel, join=never)
workers._end_with_parent()
print("goes on")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker ends when its task lets go of Python's lock")
def test_a_worker_whose_parent_has_ended_before_it_asks_for_a_signal_ends_too():
    done = subprocess.run([sys.executable, "-c", PARENT_THAT_HAS_ENDED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")

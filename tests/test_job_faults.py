"""A job of four processes of which one is killed, crashes, aborts or hangs, again and again, finishes bitwise the same.

The kinds are those that torchft inflicts. Each comes five steps after the job steps again.
"""

import os
import random
import signal

import pytest
from pids import ranks
from system import NOTHING_RANDOM, assert_same_run, command, run, started, until
from tally import ROUNDS

from vit_dist.run.metrics import read_rows

pytestmark = pytest.mark.chaos

FAULTS = {
    "a segmentation fault": signal.SIGSEGV,
    "an abort": signal.SIGABRT,
    "a kill": signal.SIGKILL,
    "a hang": signal.SIGSTOP,
}
STEPS = 200 * ROUNDS
OVERRIDES = (f"total_steps={STEPS}", "mesh.data=4", "checkpoint.every_steps=5", "checkpoint.keep_last=2")
QUICK = ("deadlines.peer_seconds=8", "evaluate.every_steps=0", *NOTHING_RANDOM)


def launched(workdir, restarts):
    plain = command(workdir, *OVERRIDES, *QUICK)
    launch = ["launch", "--processes=4", "--devices-per-process=1", f"--restarts={restarts}", "--"]
    return [*plain[:3], *launch, *plain[3:]]


def newest_step(workdir):
    written = read_rows(workdir) if (workdir / "metrics.jsonl").exists() else []
    return written[-1]["step"] if written else 0


def until_it_has_stepped(running, workdir, steps=5):
    reached = newest_step(workdir) + steps
    until(lambda: newest_step(workdir) >= reached and len(ranks(running)) == 4, running)


def until_it_is_restarted(running, before):
    """Waits until the launcher has four processes none of which was there before."""
    until(lambda: len(ranks(running)) == 4 and before.isdisjoint(ranks(running).values()), running)


def test_a_job_whose_processes_fail_in_turn_ends_as_if_none_had(tmp_path, tally):
    code, running = run(launched(tmp_path / "whole", 0), tmp_path / "whole")
    assert code == 0, running.said()[-3000:]
    dice, workdir = random.Random(0), tmp_path / "run"
    faults = list(FAULTS.items()) * ROUNDS
    with started(launched(workdir, len(faults)), tmp_path / "said") as running:
        for fault, number in faults:
            with tally.attempts(f"{fault} of one process of 4", 1):
                until_it_has_stepped(running, workdir)
                before = set(ranks(running).values())
                os.kill(dice.choice(sorted(before)), number)
                until_it_is_restarted(running, before)
        assert running.wait() == 0, running.said()[-3000:]
    assert_same_run(workdir, tmp_path / "whole", STEPS, *OVERRIDES, *QUICK)

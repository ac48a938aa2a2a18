"""A run whose processes are killed at any moment, again and again, ends as the run that never was."""

import contextlib
import os
import random
import signal
import subprocess
from pathlib import Path

import pytest
from pids import ranks
from system import Running, assert_same_run, command, run, started
from tally import ROUNDS

pytestmark = pytest.mark.chaos

STEPS = 40
OVERRIDES = (
    f"total_steps={STEPS}", "batch_size=32", "mesh.data=4", "ema_decay=0.9", "checkpoint.every_steps=3",
    "evaluate.every_steps=10", "checkpoint.keep_last=2",
)  # fmt: skip
ALLOWED = {"checkpoints", "classes.json", "config.json", "curves.svg", "environment.json", "metrics.jsonl"}
ALLOWED |= {"summary.json", "tensorboard"}


@pytest.fixture(scope="module", params=[1, 4])
def job(request, tmp_path_factory):
    """How many processes, and the folder of a job of so many that was left alone."""
    folder = tmp_path_factory.mktemp("kills")
    code, running = run(_command(request.param, folder / "whole"), folder / "said")
    assert code == 0, running.said()[-3000:]
    return request.param, folder


def _command(processes: int, workdir: Path) -> list[str]:
    plain = command(workdir, *OVERRIDES, f"fake_devices={4 // processes}")
    if processes == 1:
        return plain
    launch = [f"--processes={processes}", f"--devices-per-process={4 // processes}"]
    words = [word for word in plain[3:] if "fake_devices" not in word]
    return [*plain[:3], "launch", *launch, "--", *words]


def test_a_run_that_is_killed_at_any_moment_ends_as_if_it_had_not_been(job, tally):
    processes, folder = job
    dice = random.Random(processes)
    fault = f"kill -9 of one process of {processes}, at a random moment"
    kills = ROUNDS * (6 if processes == 1 else 3)
    while kills:
        workdir = folder / f"run{kills}"
        with tally.attempts(fault) as attempts:
            while True:
                with started(_command(processes, workdir), folder / f"said{kills}") as running:
                    killed = kills > 0 and _killed_within(running, dice.uniform(0, 4.0 + 3.0 * processes), dice)
                    code = running.wait()
                    assert code == 0 or killed, running.said()[-3000:]
                attempts.count += killed
                kills -= killed
                if code == 0:
                    break
            assert_same_run(workdir, folder / "whole", STEPS, *OVERRIDES)
            # A kill after the summary leaves the owner's file: a finished run is only read.
            assert {path.name for path in workdir.iterdir() if not path.name.startswith(".owner.")} == ALLOWED
            steps = {path.name for path in (workdir / "checkpoints").iterdir()}
            assert steps == {path.name for path in (folder / "whole" / "checkpoints").iterdir()}


def _killed_within(running: Running, seconds: float, dice: random.Random) -> bool:
    """Kills a process of a job after so many seconds; returns False if the job has ended before."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        running.wait(seconds)
        return False
    victim = dice.choice(list(ranks(running).values()) or [running.process.pid])
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.kill(victim, signal.SIGKILL)
    return True

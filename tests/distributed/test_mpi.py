"""`launch/mpi.sh` with two real ranks under Open MPI: they stop, resume, and follow the curve of one device."""

import os
import shutil
import signal
import subprocess

import pytest
from system import (
    RECIPE,
    ROOT,
    checkpoint_steps,
    examples,
    largest_difference,
    losses,
    rows,
    run,
    started,
    train_here,
    until,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("mpirun") is None, reason="NO MPI WAS RUN: mpirun not found: apt-get install openmpi-bin"
    ),
]

STEPS = 60


def _command(workdir, *overrides):
    overrides = ("fake_devices=4", *overrides)
    return [ROOT / "launch" / "mpi.sh", RECIPE, workdir, *(f"--config.{override}" for override in overrides)]


def _variables():
    """The environment of two ranks on this machine, perhaps as root, without a cache of compiled programs.

    On CPUs only process 0 can use a cached program. If it is ready more than 30 s before the others, as on a busy
    machine when a job starts again, gloo times out.
    """
    as_root = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM") if os.geteuid() == 0 else ()
    return {"HOSTS": "localhost:2", "JAX_COMPILATION_CACHE_DIR": "", **dict.fromkeys(as_root, "1")}


def test_ranks_save_on_sigterm_end_with_75_and_resume_along_the_curve_of_one_device(tmp_path):
    command = _command(tmp_path / "run", f"total_steps={STEPS}", "checkpoint.every_steps=10")
    with started(command, tmp_path / "first", **_variables()) as job:
        until(lambda: checkpoint_steps(tmp_path / "run"), job)
        job.process.terminate()
        assert job.wait() == 75, job.said()[-3000:]
    saved = checkpoint_steps(tmp_path / "run")[-1]
    assert 0 < saved < STEPS
    code, again = run(command, tmp_path / "again", **_variables())
    assert code == 0, again.said()[-3000:]
    assert f"resuming from step {saved}" in again.said() and again.result()["step"] == STEPS

    joined, expected = rows(tmp_path / "run"), train_here(tmp_path / "one", "mesh.data=1")
    assert [row["step"] for row in joined if row["split"] == "train"] == list(range(1, STEPS + 1))
    assert examples(joined)[:20] == examples(expected)
    difference = largest_difference(losses(joined)[:20], losses(expected))
    print(f"largest relative difference of a loss: {difference:.1e}")
    assert difference < 1e-4


def test_a_ctrl_c_at_the_terminal_ends_with_130_and_leaves_no_rank_behind(tmp_path):
    command = _command(tmp_path / "run", "total_steps=100000", "checkpoint.every_steps=10")
    with started(command, tmp_path / "out", start_new_session=True, **_variables()) as job:
        until(lambda: checkpoint_steps(tmp_path / "run"), job)
        assert len(_ranks(tmp_path)) >= 2
        os.killpg(job.process.pid, signal.SIGINT)  # as a terminal does: to all that it started
        assert job.wait(100) == 130, job.said()[-3000:]
    assert not _ranks(tmp_path)


def _ranks(folder):
    """The command lines of running processes that name the folder."""
    matches = subprocess.run(["pgrep", "--full", "--list-full", str(folder)], capture_output=True, text=True)
    return matches.stdout.splitlines()

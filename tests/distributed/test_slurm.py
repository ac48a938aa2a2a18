"""`launch/slurm.sbatch` under a real SLURM of two nodes on this machine: a run is stopped, requeued and resumed."""

import json
import time

import pytest
import slurm
from system import RECIPE, ROOT, as_two, checkpoint_steps, rows

pytestmark = pytest.mark.slow

STEPS = 120
RUN = (f"total_steps={STEPS}", "checkpoint.every_steps=10")


@pytest.fixture(scope="module")
def cluster():
    if why := slurm.missing():
        pytest.skip(f"NO SLURM WAS RUN: {why}")
    with slurm.Cluster() as cluster:
        yield cluster


def _submit(cluster, folder, *overrides):
    """Submits a job of one task on each node, with four fake devices, that trains into `folder/run`; returns its id."""
    command = ["sbatch", "--parsable", f"--chdir={ROOT}", f"--output={folder}/job.out"]
    command += ["--nodes=2", "--ntasks-per-node=1", "--gres=none", "launch/slurm.sbatch", RECIPE, folder / "run"]
    overrides = ("fake_devices=4", *RUN, *overrides)
    return cluster.run(*map(str, command), *(f"--config.{override}" for override in overrides))


def _until(condition, cluster, job, folder, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, (
            cluster.run("scontrol", "show", "job", job),
            _said(folder)[-4000:],
            cluster.logs(),
        )
        time.sleep(0.1)


def _said(folder):
    output = folder / "job.out"
    return output.read_text() if output.exists() else ""


def test_a_job_saves_on_sigterm_is_requeued_and_ends_as_if_undisturbed(cluster, tmp_path):
    job = _submit(cluster, tmp_path)
    _until(lambda: checkpoint_steps(tmp_path / "run"), cluster, job, tmp_path)
    cluster.run("scancel", "--signal=TERM", job)
    signalled = time.monotonic()
    _until(lambda: cluster.restarts(job) == 1, cluster, job, tmp_path)
    print(f"saved, ended and queued again within {time.monotonic() - signalled:.1f} s")
    saved = checkpoint_steps(tmp_path / "run")[-1]
    assert 0 < saved < STEPS
    assert f"job {job} ended with 75 and is queued again" in _said(tmp_path)

    # SLURM waits two minutes, and accepts a shorter wait only once the nodes are clean; it also revokes the job's
    # credentials, so that one second would be too short.
    hurry = "scontrol", "update", f"JobId={job}", "StartTime=now+5seconds"
    _until(lambda: cluster.succeeds(*hurry), cluster, job, tmp_path)
    _until(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), cluster, job, tmp_path)
    assert cluster.state(job) == "COMPLETED", _said(tmp_path)[-4000:]
    said = _said(tmp_path)
    assert f"resuming from step {saved}" in said
    assert json.loads(said.splitlines()[-1])["step"] == STEPS
    sessions = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert [session["devices"]["processes"] for session in sessions] == [2, 2]
    assert [session["devices"]["count"] for session in sessions] == [8, 8]

    (tmp_path / "undisturbed").mkdir()
    undisturbed, _ = as_two(tmp_path / "undisturbed", *RUN)
    assert undisturbed.wait() == 0, undisturbed.said()[-3000:]
    resumed, expected = rows(tmp_path / "run"), rows(tmp_path / "undisturbed" / "run")
    assert [row["step"] for row in resumed if row["split"] == "train"] == list(range(1, STEPS + 1))
    assert resumed == expected


def test_a_job_that_is_cancelled_or_has_a_usage_error_is_not_requeued(cluster, tmp_path):
    (tmp_path / "wrong").mkdir()
    job = _submit(cluster, tmp_path / "wrong", "mesh.fsdp=3")
    _until(lambda: cluster.state(job) == "FAILED", cluster, job, tmp_path / "wrong")
    assert cluster.exit_code(job) == 2 and cluster.restarts(job) == 0
    assert "error: mesh:" in _said(tmp_path / "wrong")

    job = _submit(cluster, tmp_path)
    _until(lambda: checkpoint_steps(tmp_path / "run"), cluster, job, tmp_path)
    cluster.run("scancel", job)
    _until(lambda: cluster.state(job) == "CANCELLED", cluster, job, tmp_path)
    _until(cluster.idle, cluster, job, tmp_path)
    assert cluster.restarts(job) == 0 and cluster.state(job) == "CANCELLED"

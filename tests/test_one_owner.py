"""A workdir has one trainer: the second is refused and told who holds it, whatever end the first has come to."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from system import NOTHING_RANDOM, checkpoint_steps, command, rows, run, started, train_here, until

from vit_dist.config import ConfigError
from vit_dist.features import features
from vit_dist.run.lock import locked

SMALLEST = str(Path(__file__).parent / "helpers" / "smallest.py")
LONG = (*NOTHING_RANDOM, "fake_devices=1", "total_steps=100000", "evaluate.every_steps=0", "checkpoint.every_steps=50")
TWO = (*LONG, "mesh.data=-1")


def hidden(workdir):
    return sorted(file.name for file in workdir.rglob(".*"))


def launch(workdir, *overrides, **options):
    python, dash_m, package, *verb = command(workdir, *overrides)
    words = [f"--{name}={value}" for name, value in {"processes": 2, "devices-per-process": 1, **options}.items()]
    return [python, dash_m, package, "launch", *words, "--", *verb]


def test_a_second_trainer_is_refused_and_the_first_goes_on(tmp_path):
    workdir = tmp_path / "run"
    with started(command(workdir, *LONG), tmp_path / "first") as first:
        until(lambda: checkpoint_steps(workdir), first)
        before = (workdir / "environment.json").read_bytes()
        code, second = run(command(workdir, *LONG), tmp_path / "second")
        assert code == 2 and second.said().count("\n") == 1 and (workdir / "environment.json").read_bytes() == before
        told = f"error: {workdir}: process {first.process.pid} on {os.uname().nodename}, since 20"
        assert second.said().startswith(told)
        assert second.said().endswith("writes there; end it first, or choose another --workdir\n")
        code, other = run(command(workdir, *LONG, "total_steps=9"), tmp_path / "other")  # whatever it asks for
        assert code == 2 and other.said().startswith(told)
        step = rows(workdir)[-1]["step"]
        until(lambda: rows(workdir)[-1]["step"] > step, first)
        first.process.send_signal(signal.SIGTERM)
        assert first.wait() == 75
    assert hidden(workdir) == []


def test_what_was_killed_is_continued_at_once_and_its_remains_are_removed(tmp_path):
    workdir = tmp_path / "run"
    with started(command(workdir, *LONG), tmp_path / "first") as first:
        until(lambda: checkpoint_steps(workdir), first)
        first.process.kill()
        first.wait()
    assert hidden(workdir) == [".owner.1"]
    partial = workdir / f".classes.json.{'0' * 32}.tmp"
    partial.write_text("half a")
    with started(command(workdir, *LONG), tmp_path / "second") as second:
        until(lambda: "resuming from step" in second.said(), second)
        assert ".owner.2" in hidden(workdir) and not partial.exists()
        until(lambda: "img/s" in second.said(), second)  # it has stepped, and so has something to save
        second.process.send_signal(signal.SIGTERM)
        assert second.wait() == 75
    assert "waiting" not in second.said() and hidden(workdir) == []


def test_a_workdir_that_another_has_finished_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    """It was looked at without its lock, before the data were opened."""

    def slowly(*arguments):
        monkeypatch.undo()
        train_here(tmp_path / "run", *NOTHING_RANDOM, "total_steps=2")
        return locked(*arguments)

    monkeypatch.setattr(sys.modules["vit_dist.train"], "locked", slowly)  # the package's `train` is the function
    with pytest.raises(ConfigError, match="another process has trained there meanwhile; start again"):
        train_here(tmp_path / "run", *NOTHING_RANDOM, "total_steps=3")
    assert json.loads((tmp_path / "run/config.json").read_text())["total_steps"] == 2


def test_a_trainer_that_has_lost_its_lock_saves_no_more(tmp_path):
    workdir = tmp_path / "run"
    with started(command(workdir, *LONG), tmp_path / "first") as first:
        until(lambda: checkpoint_steps(workdir), first)
        (workdir / ".owner.1").unlink()
        assert first.wait(60) == 2
    assert first.said().splitlines()[-1].startswith(f"error: {workdir}: the lock was taken away")
    assert "Traceback" not in first.said()


def test_of_two_extractions_into_one_file_the_second_is_refused(tmp_path):
    train_here(tmp_path / "run", *NOTHING_RANDOM, "total_steps=2")
    out = tmp_path / "out.npz"
    with locked(tmp_path / "out.npz.parts", 60, "OUT"):
        told = f"out.npz.parts: process {os.getpid()} on .* writes there; end it first, or choose another OUT"
        with pytest.raises(ConfigError, match=told):
            features(tmp_path / "run", out, split="test")
    (tmp_path / f".out.npz.{'0' * 32}.tmp").write_text("half a")
    assert features(tmp_path / "run", out, split="test")["count"] == 360
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.npz", "run"]


@pytest.mark.parametrize("size", [6000, 40_000])
def test_a_disk_that_takes_no_more_ends_a_run_with_one_line(tmp_path, size):
    """Of the first row, or of many. A limit of the size of files stands for the disk's."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    overrides = ("fake_devices=1", "total_steps=5000", "evaluate.every_steps=0", "checkpoint.every_steps=0")
    words = ["train", f"--config={SMALLEST}", f"--workdir={tmp_path}/run", *(f"--config.{one}" for one in overrides)]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": ""}
    done = subprocess.run(
        [sys.executable, "-m", "vit_dist", *words], preexec_fn=limited, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1] == f"error: {tmp_path}/run: File too large"
    assert done.stderr.count("error") == 1 and "Traceback" not in done.stderr
    assert hidden(tmp_path) == []


@pytest.mark.slow
def test_a_job_of_two_processes_has_one_lock_and_agrees_that_another_is_refused(tmp_path):
    workdir = tmp_path / "run"
    with started(launch(workdir, *TWO), tmp_path / "first") as first:
        until(lambda: checkpoint_steps(workdir), first)
        assert [name for name in hidden(workdir) if "owner" in name] == [".owner.1"]
        for words in (launch(workdir, *TWO, restarts=3), command(workdir, *LONG)):
            code, second = run(words, tmp_path / "second")
            assert code == 2 and second.said().count("error:") == 1 and "restart" not in second.said()
            assert " writes there; end it first, or choose another --workdir\n" in second.said()
        first.process.send_signal(signal.SIGTERM)
        assert first.wait() == 75
    assert hidden(workdir) == []


@pytest.mark.slow
def test_a_job_whose_owner_is_killed_starts_again_with_the_lock(tmp_path):
    workdir = tmp_path / "run"
    with started(launch(workdir, *TWO, restarts=3), tmp_path / "job") as job:
        until(lambda: checkpoint_steps(workdir), job)
        for number in (1, 2):
            owner = json.loads((workdir / f".owner.{number}").read_text())
            os.kill(owner["pid"], signal.SIGKILL)
            until((workdir / f".owner.{number + 1}").exists, job)
            until(lambda: job.said().count("resuming from step") == number, job)  # noqa: B023
            step = rows(workdir)[-1]["step"]
            until(lambda: rows(workdir)[-1]["step"] > step + 50, job)  # noqa: B023
        job.process.send_signal(signal.SIGTERM)
        assert job.wait() == 75
    assert hidden(workdir) == []

"""Law 1 in time: a run that was killed or stopped, and started again, is bit for bit the run that never was."""

import contextlib
import io
import json
import shutil
import signal
from subprocess import TimeoutExpired

import pytest
from system import (
    assert_same_run,
    checkpoint_steps,
    command,
    largest_difference,
    losses,
    rows,
    run,
    started,
    train_here,
    until,
)

from vit_dist import cli

STEPS, EVERY = 48, 20  # 22.5 steps are an epoch
MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
RUN = (f"total_steps={STEPS}", "ema_decay=0.9", f"evaluate.every_steps={EVERY}", f"checkpoint.every_steps={EVERY}")
HERE = (*MESH, *RUN)  # in this process, which has its eight devices already
THERE = (*HERE, "fake_devices=8")
SHORT = (*HERE, "evaluate.every_steps=0", "checkpoint.every_steps=0")


def beyond_checkpoint(workdir, steps=3):
    """Whether the run has written the rows of so many steps after its newest checkpoint."""

    def condition():
        saved, written = checkpoint_steps(workdir), rows(workdir)
        return bool(saved) and bool(written) and written[-1]["step"] >= saved[-1] + steps

    return condition


def interrupted(folder, how):
    """The workdir of a run sent the signal `how` a few steps past a checkpoint, and its exit code."""
    workdir = folder / "run"
    with started(command(workdir, *THERE), folder / "interrupted") as running:
        until(beyond_checkpoint(workdir), running)
        running.process.send_signal(how)
        code = running.wait()
        return workdir, code, running.said()


def printed(workdir, *overrides):
    """What the command prints of a run to its end in this process: the summary."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(command(workdir, *overrides)[3:]) == 0
    return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """The workdir of a whole run, and the summary that its command printed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, printed(workdir, *HERE)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The workdir of a run that was sent SIGTERM, its exit code, and what it said."""
    return interrupted(tmp_path_factory.mktemp("stopped"), signal.SIGTERM)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The workdir of a finished run of four steps, of the program that the longer runs have compiled."""
    workdir = tmp_path_factory.mktemp("short") / "run"
    train_here(workdir, *SHORT, "total_steps=4")
    return workdir


def test_a_run_killed_in_an_epoch_and_started_again_is_bitwise_the_run_never_killed(never_stopped, tmp_path):
    workdir, code, _ = interrupted(tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL
    saved, reached = checkpoint_steps(workdir)[-1], rows(workdir)[-1]["step"]
    assert EVERY <= saved < reached < STEPS
    code, again = run(command(workdir, *THERE), tmp_path / "again")
    assert code == 0, again.said()[-3000:]
    assert f"resuming from step {saved}\n" in again.said()
    assert_same_run(workdir, never_stopped[0], STEPS, *RUN)
    assert {name: again.result()[name] for name in ("step", "count", "loss", "top1")} == {
        name: never_stopped[1][name] for name in ("step", "count", "loss", "top1")
    }


def test_sigterm_saves_the_step_it_stopped_at_and_exits_75(stopped):
    workdir, code, said = stopped
    assert code == 75
    assert checkpoint_steps(workdir)[-1] == rows(workdir)[-1]["step"] < STEPS
    assert f"preempted: saved step {rows(workdir)[-1]['step']} of {STEPS}" in said
    assert not (workdir / "summary.json").exists()


def test_a_run_stopped_by_sigterm_and_started_again_is_bitwise_the_run_never_stopped(stopped, never_stopped, tmp_path):
    workdir = shutil.copytree(stopped[0], tmp_path / "run")
    train_here(workdir, *HERE)
    assert_same_run(workdir, never_stopped[0], STEPS, *RUN)


def test_a_run_resumed_on_another_mesh_keeps_its_curve(stopped, never_stopped, tmp_path, record_property):
    after = checkpoint_steps(stopped[0])[-1]
    workdir = shutil.copytree(stopped[0], tmp_path / "run")
    found = train_here(workdir, *RUN, "mesh.data=1", "mesh.fsdp=4")
    expected = rows(never_stopped[0])
    assert [(row["step"], row["split"]) for row in found] == [(row["step"], row["split"]) for row in expected]
    assert losses(found)[:after] == losses(expected)[:after]
    # Every row, evaluations included. (The parameters themselves may differ: attention is blind to the bias of its
    # keys, whose gradient is therefore rounding alone, and Adam makes full steps of it.)
    difference = largest_difference(*([row["loss"] for row in one] for one in (found, expected)))
    record_property("largest_relative_difference", difference)
    assert difference < 1e-4


def test_a_run_that_leaves_scan_to_the_program_keeps_what_it_began_with(short, tmp_path):
    """The tests' recipe stacks its blocks, and on a CPU the program itself would not."""
    workdir = shutil.copytree(short, tmp_path / "run")
    longer = (*SHORT, "model.scan=auto", "total_steps=5")
    assert [row["step"] for row in train_here(workdir, *longer)] == [1, 2, 3, 4, 5]
    assert json.loads((workdir / "config.json").read_text())["model"]["scan"] is True
    train_here(tmp_path / "new", *longer)
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model"]["scan"] is False


def test_a_finished_run_asked_again_prints_the_same_summary(never_stopped):
    workdir, summary = never_stopped
    before = {file.name: file.read_bytes() for file in workdir.iterdir() if file.is_file()}
    assert printed(workdir, *HERE) == summary
    assert {file.name: file.read_bytes() for file in workdir.iterdir() if file.is_file()} == before


def test_the_summary_has_the_keys_that_scripts_rely_on(never_stopped):
    workdir, summary = never_stopped
    assert list(summary) == ["step", "count", "loss", "top1", "seconds", "workdir"]
    last = rows(workdir)[-1]
    assert (last["step"], last["split"]) == (STEPS, "test/ema")
    assert (summary["count"], summary["loss"], summary["top1"]) == (360, last["loss"], last["top1"])
    assert summary["workdir"] == str(workdir)


@pytest.mark.parametrize(
    "change",
    [
        {"model.depth": 3},
        {"optimizer.name": "sgd"},
        {"seed": 1},
        {"batch_size": 32},
        {"model.width": 64, "mixup": 0.5, "data.rotate": 5.0},
    ],
    ids=lambda change: ",".join(change),
)
def test_a_change_that_cannot_resume_is_an_error_that_lists_the_keys(change, short, capsys):
    before = sorted(str(file) for file in short.rglob("*"))
    overrides = [f"--config.{key}={value}" for key, value in change.items()]
    assert cli.main([*command(short, *SHORT, "total_steps=8")[3:], *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    for key, value in change.items():
        assert f"{key} (was " in error[0] and f"now {value!r})" in error[0]
    assert "total_steps" not in error[0] and "mesh" not in error[0]
    assert sorted(str(file) for file in short.rglob("*")) == before


def test_a_finished_run_whose_length_is_raised_goes_on(short, tmp_path):
    workdir = shutil.copytree(short, tmp_path / "run")
    longer = train_here(workdir, *SHORT, "total_steps=7")
    whole = train_here(tmp_path / "whole", *SHORT, "total_steps=7")
    assert longer == whole  # the schedule is constant, so its length bends nothing
    assert json.loads((workdir / "summary.json").read_text())["step"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [(3.0, 4.5, 6.0), (4.0, 4.5, 5.0, 5.5, 6.0, 6.5, 7.0)])
def test_a_run_killed_many_times_at_any_moment_is_bitwise_the_run_never_killed(seconds, never_stopped, tmp_path):
    workdir, killed = tmp_path / "run", 0
    for number, delay in enumerate(seconds):
        with started(command(workdir, *THERE), tmp_path / f"{number}") as running:
            try:
                assert running.wait(delay) == 0, running.said()[-3000:]
            except TimeoutExpired:  # and it is killed
                killed += 1
    assert killed > len(seconds) // 2
    code, again = run(command(workdir, *THERE), tmp_path / "again")
    assert code == 0, again.said()[-3000:]
    assert_same_run(workdir, never_stopped[0], STEPS, *RUN)

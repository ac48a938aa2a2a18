"""`vit-dist launch` for real: processes with eight devices in all make one run, also when one is killed."""

import functools
import os
import re
import signal
import socket
import sys

import pytest
from pids import ranks, wait_until_gone
from system import (
    assert_same_run,
    checkpoint_steps,
    command,
    examples,
    largest_difference,
    losses,
    rows,
    run,
    started,
    train_here,
    until,
)

STEPS, EVERY = 20, 10
RUN = (f"total_steps={STEPS}", f"checkpoint.every_steps={EVERY}", "evaluate.every_steps=15", "mesh.data=-1")


def launch(workdir, *overrides, processes=4, **options):
    """Returns the command of a job of so many processes with eight devices in all."""
    options = {"processes": processes, "devices-per-process": 8 // processes, **options}
    words = [f"--{name}={value}" for name, value in options.items()]
    python, dash_m, package, *verb = command(workdir, *overrides)
    return [python, dash_m, package, "launch", *words, "--", *verb]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A function of the number of processes that returns the workdir of a complete run, and its launcher, ended."""

    @functools.cache
    def ended(processes):
        folder = tmp_path_factory.mktemp("launched")
        code, running = run(launch(folder / "run", *RUN, processes=processes), folder / "launcher")
        assert code == 0, running.said()[-3000:]
        return folder / "run", running

    return ended


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_curve_of_launched_processes_is_that_of_one_device(processes, undisturbed, tmp_path, record_property):
    workdir, running = undisturbed(processes)
    launched, expected = rows(workdir), train_here(tmp_path, *RUN, "mesh.data=1")
    difference = largest_difference(losses(launched), losses(expected))
    record_property("largest_relative_difference", difference)
    print(f"largest relative difference of a loss: {difference:.1e}")
    assert len(losses(launched)) == running.result()["step"] == STEPS
    assert examples(launched) == examples(expected)
    assert difference < 1e-4
    assert f"[0] mesh data=8, device cpu, processes {processes}" in running.said()


def test_standard_output_of_the_job_is_the_result_alone(undisturbed):
    _, running = undisturbed(2)
    assert len(running.stdout.read_text().splitlines()) == 1
    assert list(running.result()) == ["step", "count", "loss", "top1", "seconds", "workdir"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_process_is_named_and_after_a_restart_the_run_is_bitwise_as_if_undisturbed(
    rank, undisturbed, tmp_path
):
    workdir = tmp_path / "run"
    with started(launch(workdir, *RUN, restarts=1), tmp_path / "launcher") as running:
        until(lambda: len(checkpoint_steps(workdir)) > 0 and rows(workdir)[-1]["step"] > EVERY, running)
        numbers = ranks(running)
        assert sorted(numbers) == [0, 1, 2, 3]
        os.kill(numbers[rank], signal.SIGKILL)
        gone = wait_until_gone(numbers.values(), seconds=10)
        assert running.wait(400) == 0, running.said()[-3000:]
    print(f"all had ended {gone:.1f} s after process {rank} was killed")
    said = running.said()
    (blamed,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert blamed.startswith(
        f"error: process {rank} of 4 (on {socket.gethostname()}, pid {numbers[rank]}) was ended by SIGKILL"
    )
    assert said.count("launch: the job failed; starting again in 1 s (restart 1 of 1)") == 1
    saved = int(re.search(r"^\[0\] resuming from step (\d+)$", said, re.MULTILINE)[1])
    assert EVERY <= saved < STEPS
    assert_same_run(workdir, undisturbed(4)[0], STEPS, *RUN)


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_the_same_command_resumes_bitwise(undisturbed, tmp_path):
    workdir = tmp_path / "run"
    with started(launch(workdir, *RUN, restarts=3), tmp_path / "first") as running:
        until(
            lambda: (workdir / "metrics.jsonl").exists() and rows(workdir)[-1:] and rows(workdir)[-1]["step"] > 2,
            running,
        )
        running.process.send_signal(signal.SIGTERM)
        assert running.wait() == 75, running.said()[-3000:]
    (saved,) = checkpoint_steps(workdir)
    assert running.said().count(f"preempted: saved step {saved} of {STEPS}") == 4
    assert "starting again" not in running.said()
    code, again = run(launch(workdir, *RUN), tmp_path / "again")
    assert code == 0, again.said()[-3000:]
    assert f"[0] resuming from step {saved}\n" in again.said()
    assert_same_run(workdir, undisturbed(4)[0], STEPS, *RUN)


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("model.dpeth=3", "error: unknown key model.dpeth (did you mean model.depth?)"),
        ("batch_size=0", "error: batch_size: must be above 0, found 0"),
        (
            "mesh.fsdp=3",
            "error: mesh: fsdp=3 uses 3 devices, which do not divide the 8 there are",
        ),  # found after the processes have connected
    ],
)
def test_a_usage_error_of_all_processes_is_printed_once_and_not_tried_again(override, error, tmp_path):
    code, running = run(launch(tmp_path / "run", override, processes=2, restarts=3), tmp_path / "launcher")
    assert (code, running.stdout.read_text()) == (2, "")
    (line,) = [line for line in running.said().splitlines() if "error" in line or "launch" in line]
    assert line.startswith(error)

"""SIGTERM and Ctrl-C at any moment of a command: it ends with 75 or 130, and what was trained is saved.

`make chaos` has those at random moments.
"""

import contextlib
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from pids import ranks
from system import NOTHING_RANDOM, assert_same_run, checkpoint_steps, command, rows, started
from tally import ROUNDS

from vit_dist.job.launcher import free_port

CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
LONG = ("total_steps=100000", "evaluate.every_steps=0", "checkpoint.every_steps=0", *NOTHING_RANDOM)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc for the handlers of a process")


def job(workdir, processes):
    """Returns the command that trains as one process, or as several."""
    words = command(workdir, *LONG, f"mesh.data={processes}", *(["fake_devices=1"] if processes == 1 else []))
    if processes == 1:
        return words
    options = [f"--processes={processes}", "--devices-per-process=1", "--"]
    return [*words[:3], "launch", *options, *words[3:]]


def answers(pid):
    """Whether a process has a handler of SIGTERM, as from the first line of `main` on."""
    caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:\t")[2][:16]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def wait(condition, running, seconds=120):
    """Returns whether the condition came to hold before the command ended."""
    deadline = time.monotonic() + seconds
    while running.process.poll() is None and not condition():
        assert time.monotonic() < deadline, running.said()[-3000:]
        time.sleep(0.002)
    return running.process.poll() is None


def number_of_rows(workdir):
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def moments(workdir, running):
    """Name -> what holds from that moment on."""
    before = number_of_rows(workdir)
    return {
        "first line": lambda: answers(running.process.pid),
        "import": lambda: time.sleep(0.4) or answers(running.process.pid),
        "processes begin": lambda: len(ranks(running)) > 0 and all(map(answers, ranks(running).values())),
        "state made": lambda: "crop and flip" in running.said() or "examples, 100,000 steps" in running.said(),
        "first rows": lambda: number_of_rows(workdir) > before + 1,
    }


def end_by(number, workdir, processes, output, moment, to=None):
    """Sends a signal at a moment, a name or a number of seconds, to the command or to one process of the job.

    Asserts what holds whatever the moment is, and returns the step that was saved; None if none was.
    """
    saved_before = max(checkpoint_steps(workdir), default=0)
    with started(job(workdir, processes), output) as running:
        if isinstance(moment, float):
            wait(lambda: answers(running.process.pid), running)
            time.sleep(moment)
        else:
            assert wait(moments(workdir, running)[moment], running), running.said()[-3000:]
        pid = running.process.pid if to is None else ranks(running)[to]
        os.kill(pid, number)
        sent, seen = time.monotonic(), number_of_rows(workdir)
        code = running.wait(60)
        took = time.monotonic() - sent
    said = running.said()
    print(f"{processes} processes, {moment}: {code} after {took:.1f} s")
    assert code == CODES[number], f"{code} at {moment}:\n{said[-3000:]}"
    assert "Traceback" not in said and "error" not in said, said[-3000:]
    saved = max(checkpoint_steps(workdir), default=0)
    word = "preempted" if number == signal.SIGTERM else "interrupted"
    if saved == saved_before:  # it had no step to save
        assert f"{word}" in said and "saving step" not in said, said[-3000:]
        return None
    assert said.count(f"{word}: saved step {saved} of 100000") == processes
    assert rows(workdir)[-1]["step"] == saved >= seen
    return saved


@pytest.mark.parametrize("number", CODES)
def test_a_signal_at_any_moment_ends_a_process_fresh_or_resumed(number, tmp_path):
    run = tmp_path / "run"
    for moment in ("first line", "import", "state made"):
        assert end_by(number, run, 1, tmp_path / "output", moment) is None
    fresh = end_by(number, run, 1, tmp_path / "output", "first rows")
    for moment in ("first line", "state made"):
        assert end_by(number, run, 1, tmp_path / "output", moment) is None
    assert end_by(number, run, 1, tmp_path / "output", "first rows") > fresh
    assert [row["step"] for row in rows(run)] == list(range(1, checkpoint_steps(run)[-1] + 1))


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_signal_at_any_moment_ends_a_job_fresh_or_resumed(processes, tmp_path):
    """To the launcher, or to one of its processes alone."""
    run, last, output = tmp_path / "run", processes - 1, tmp_path / "output"
    assert end_by(signal.SIGTERM, run, processes, output, "first line") is None
    assert end_by(signal.SIGTERM, run, processes, output, "processes begin", to=last) is None
    assert end_by(signal.SIGINT, run, processes, output, "state made") is None
    fresh = end_by(signal.SIGTERM, run, processes, output, "first rows", to=last)
    assert end_by(signal.SIGTERM, run, processes, output, "processes begin", to=0) is None
    end_by(signal.SIGTERM, run, processes, output, "state made", to=last)
    assert end_by(signal.SIGINT, run, processes, output, "first rows") > fresh
    assert [row["step"] for row in rows(run)] == list(range(1, checkpoint_steps(run)[-1] + 1))


IMPORTING = """
import os, signal, sys
from vit_dist.job import signals
sys.argv = ["vit-dist", "configs"]
signals.answer()
signals.alone()
import slow
"""
SLOW = """
import os, signal, time
os.kill(os.getpid(), signal.SIGTERM)
try:
    time.sleep(60)
except BaseException:  # as a module in C++ does
    os.abort()
"""


def test_a_signal_during_an_import_ends_the_process(tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    variables = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    with started([sys.executable, "-c", IMPORTING], tmp_path / "output", **variables) as running:
        assert running.wait(20) == 75
    assert running.said() == "preempted: there was nothing to save\n"


EVALUATING = """
import os, signal, sys
from vit_dist import cli
from vit_dist.job import preemption
calls, check = 0, preemption.check_between_batches
def check_and_kill():
    global calls
    calls += 1
    if calls == 5 and os.environ.get("VIT_DIST_PROCESS", "0") == "0":
        os.kill(os.getpid(), signal.SIGTERM)
    check()
preemption.check_between_batches = check_and_kill
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_during_an_evaluation_saves_before_its_end_and_the_next_session_evaluates(processes, tmp_path):
    """The fifth batch of the first split is the first whose signal is seen; there are 45 batches of 8 in it."""
    overrides = (f"fake_devices={2 // processes}", "mesh.data=2", "total_steps=4", "evaluate.every_steps=2")
    overrides = (*overrides, "evaluate.splits=[test,train]", "evaluate.batch_size=8", "ema_decay=0.5", *NOTHING_RANDOM)
    variables = {"VIT_DIST_COORDINATOR": f"127.0.0.1:{free_port()}", "VIT_DIST_PROCESSES": str(processes)}

    def ended(name, prefix):
        words = [*prefix, *command(tmp_path / name, *overrides)[3:]]
        with contextlib.ExitStack() as opened:
            jobs = [
                opened.enter_context(started(words, tmp_path / str(rank), VIT_DIST_PROCESS=str(rank), **variables))
                for rank in range(processes)
            ]
            return [running.wait() for running in jobs], jobs[0].said()

    codes, said = ended("run", [sys.executable, "-c", EVALUATING])
    assert codes == [75] * processes and "preempted: saved step 2 of 4" in said, said[-3000:]
    assert checkpoint_steps(tmp_path / "run") == [2]
    assert [row["split"] for row in rows(tmp_path / "run")] == ["train", "train"]
    for name in ("run", "undisturbed"):
        codes, said = ended(name, [sys.executable, "-m", "vit_dist"])
        assert codes == [0] * processes, said[-3000:]
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed", 4, *overrides)


@pytest.mark.chaos
@pytest.mark.parametrize("round_", range(3 * ROUNDS))
def test_a_signal_at_a_random_moment(round_, tmp_path, tally):
    """A fresh run and its resume, on 1 or 4 processes."""
    draw = random.Random(round_)
    for name in ("fresh", "resumed"):
        processes, number = draw.choice((1, 4)), draw.choice(list(CODES))
        with tally.attempts(f"{signal.Signals(number).name} at a random moment, {processes} processes", 1):
            end_by(number, tmp_path / "run", processes, tmp_path / name, draw.uniform(0, 8 * processes**0.5))

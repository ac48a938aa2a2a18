"""SIGTERM and Ctrl-C: caught inside the loop, not outside it, and agreed upon by the processes of a job."""

import os
import signal
import sys
import textwrap
import time

import numpy as np
import pytest
from pids import wait_until_gone, workers
from PIL import Image
from system import NOTHING_RANDOM, Running, checkpoint_steps, command, last_lines, rows, started, train_here, until

from vit_dist.job.preemption import StopRequest

LONG = ("mesh.data=1", "fake_devices=1", "total_steps=100000", "evaluate.every_steps=0", *NOTHING_RANDOM)


def test_sigterm_is_caught_and_the_handler_restored():
    received = []
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append("outer"))
    try:
        with StopRequest() as stop:
            assert stop.requested() is False
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested() is True
            assert stop.requested() is True
        assert received == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == ["outer"]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_the_handler_is_restored_after_an_error():
    previous = signal.getsignal(signal.SIGTERM)
    try:
        with StopRequest():
            raise KeyError("x")
    except KeyError:
        pass
    assert signal.getsignal(signal.SIGTERM) is previous


@pytest.mark.parametrize("begun", [1, 0])
def test_two_processes_stop_at_the_same_step_one_later_at_most_when_one_gets_a_signal(begun):
    """Also where a resumed run begins at step 100, and where one process is ahead of the other."""
    script = """
        import os, signal, sys, time
        begun, address, rank = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
        os.environ |= {"VIT_DIST_COORDINATOR": address, "VIT_DIST_PROCESSES": "2", "VIT_DIST_PROCESS": str(rank)}
        from vit_dist.job import processes
        from vit_dist.job.preemption import StopRequest
        processes.start(1)
        with StopRequest() as stop:
            for step in range(100, 2000):
                processes.gather(None)  # as a collective does
                if rank == begun and step == 105:
                    os.kill(os.getpid(), signal.SIGTERM)
                if stop.requested():
                    break
            print(step, stop.by_user(), flush=True)
        processes.leave(0, "", together=True)
    """
    first, second = last_lines(script, str(begun))
    assert first == second
    step, by_user = first.split()
    assert 105 <= int(step) <= 106 and by_user == "False"


def test_the_first_ctrl_c_is_caught_and_the_second_raises():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested() is True and stop.by_user() is True
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_saves_and_ends_with_130_and_the_same_command_resumes(tmp_path):
    with started(command(tmp_path / "run", *LONG), tmp_path / "first") as running:
        until(lambda: rows(tmp_path / "run"), running)
        running.process.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
        printed = running.said()
    (saved,) = checkpoint_steps(tmp_path / "run")
    assert rows(tmp_path / "run")[-1]["step"] == saved
    assert printed.endswith(f"interrupted: saved step {saved} of 100000 in {tmp_path / 'run'}\n")
    assert "Traceback" not in printed
    longer = train_here(tmp_path / "run", "mesh.data=1", *NOTHING_RANDOM, f"total_steps={saved + 1}")
    assert [row["step"] for row in longer] == list(range(1, saved + 2))


def test_a_second_ctrl_c_ends_the_command_without_waiting_for_the_save(tmp_path):
    script = f"""
        import os, signal, sys, threading, time
        from vit_dist import cli
        from vit_dist.run.checkpoints import Checkpoints
        def save(*arguments, **options):  # as Orbax does, in a thread that the interpreter waits for at its end
            threading.Thread(target=time.sleep, args=(600,)).start()
            print("saving", file=sys.stderr, flush=True)
            time.sleep(600)
        Checkpoints.save = save
        sys.argv = {["vit-dist", *command(tmp_path / "run", *LONG)[3:]]!r}
        sys.exit(cli.main())
    """
    with started([sys.executable, "-c", textwrap.dedent(script)], tmp_path / "output") as running:
        until(lambda: rows(tmp_path / "run"), running)
        running.process.send_signal(signal.SIGINT)
        until(lambda: "saving" in running.said(), running, 60)
        running.process.send_signal(signal.SIGINT)
        assert running.wait(20) == -signal.SIGINT  # a shell reports 130
    assert "Ctrl-C again ends at once, unsaved\n" in running.said() and "Traceback" not in running.said()


@pytest.mark.parametrize("again", [True, False])
def test_ctrl_c_ends_the_command_while_a_program_is_compiled(again, tmp_path):
    script = f"""
        import sys
        from vit_dist.job import signals
        signals.LAST_SECONDS = 600 if {again} else 0.5
        from vit_dist.__main__ import main
        sys.argv = {["vit-dist", *command(tmp_path / "run", "model.depth=36", "model.scan=false", *LONG)[3:]]!r}
        sys.exit(main())
    """
    with started(
        [sys.executable, "-c", textwrap.dedent(script)], tmp_path / "output", JAX_ENABLE_COMPILATION_CACHE="0"
    ) as running:
        until(lambda: (tmp_path / "run" / "environment.json").exists(), running)
        time.sleep(1)  # it compiles what makes the parameters
        running.process.send_signal(signal.SIGINT)
        if again:
            time.sleep(0.5)
            running.process.send_signal(signal.SIGINT)
        assert running.wait(20) in ((-signal.SIGINT, 130) if again else (130,))  # a shell reports 130 for both
    assert "first step" not in running.said() and "Traceback" not in running.said()


def test_a_second_ctrl_c_ends_the_command_while_it_waits_for_data(tmp_path):
    for number in range(32):
        file = tmp_path / f"set/train/{number % 2}/{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(file)
    files = (
        f"data.path={tmp_path / 'set'}",
        "data.source=folder",
        "data.in_memory=false",
        "data.workers=1",
        "batch_size=8",
        "model.num_classes=null",
    )
    with started(command(tmp_path / "run", *LONG, *files), tmp_path / "output") as running:
        until(lambda: rows(tmp_path / "run"), running)
        (worker,) = workers(running)
        os.kill(worker, signal.SIGSTOP)
        running.process.send_signal(signal.SIGINT)
        until(lambda: "Ctrl-C again" in running.said(), running, 60)
        running.process.send_signal(signal.SIGINT)
        assert running.wait(20) == -signal.SIGINT
    wait_until_gone([worker], 20)


def test_ctrl_c_ends_a_command_that_swallows_the_exception(tmp_path):
    script = """
        import sys, time
        from vit_dist import cli
        from vit_dist.job import signals
        def swallow(options):
            print("begun", file=sys.stderr, flush=True)
            try:
                time.sleep(600)
            except KeyboardInterrupt:  # as Python does in a callback of its garbage collector
                time.sleep(600)
        signals.LAST_SECONDS = 0.5
        cli._VERBS["configs"] = swallow
        sys.argv = ["vit-dist", "configs"]
        sys.exit(cli.main())
    """
    with started([sys.executable, "-c", textwrap.dedent(script)], tmp_path / "output") as running:
        until(lambda: "begun" in running.said(), running, 60)
        running.process.send_signal(signal.SIGINT)
        assert running.wait(20) == 130


def test_ctrl_c_in_a_job_saves_and_ends_all_processes_with_130(tmp_path):
    launch = [sys.executable, "-m", "vit_dist", "launch", "--processes=2", "--devices-per-process=1", "--"]
    words = command(tmp_path / "run", *LONG[2:], "mesh.data=2")[3:]
    running = Running([*launch, *words], tmp_path / "job")
    try:
        until(lambda: len(rows(tmp_path / "run")) > 2, running)
        running.process.send_signal(signal.SIGINT)
        assert running.wait(60) == 130
    finally:
        running.process.kill()
    (saved,) = checkpoint_steps(tmp_path / "run")
    assert rows(tmp_path / "run")[-1]["step"] == saved
    for index in range(2):
        assert f"[{index}] interrupted: saved step {saved} of 100000" in running.said()
    assert "error" not in running.said() and "stopped before" not in running.said()

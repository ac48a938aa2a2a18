"""Whatever becomes of one process of a job, the others end soon, and say which one it was and how it went."""

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from system import started

from vit_dist.job.launcher import free_port

PART = Path(__file__).with_name("part.py")
QUICK = 40  # seconds in which all must be gone, on a machine that has other things to do


@contextlib.contextmanager
def job(folder, what, at_fault, *, count=3, come=None, **variables):
    """The processes of a job of `count`, of which those in `come` (all) are started; see `part.py`."""
    common = {"VIT_DIST_COORDINATOR": f"127.0.0.1:{free_port()}", "VIT_DIST_PROCESSES": str(count), **variables}
    with contextlib.ExitStack() as open_:
        yield [
            open_.enter_context(
                started(
                    [sys.executable, str(PART), what, str(at_fault)],
                    folder / str(place),
                    VIT_DIST_PROCESS=str(index),
                    **common,
                )
            )
            for place, index in enumerate(come or range(count))
        ]


def errors(process):
    return [line for line in process.said().splitlines() if line.startswith("error: ")]


def ended(processes):
    """Their exit codes, and the seconds from the first to end until the last."""
    first = None
    while first is None or any(one.process.poll() is None for one in processes):
        if first is None and any(one.process.poll() is not None for one in processes):
            first = time.monotonic()
        assert first is None or time.monotonic() < first + QUICK, [one.said()[-1000:] for one in processes]
        time.sleep(0.02)
    return [one.process.returncode for one in processes], time.monotonic() - first


@pytest.fixture(scope="module", autouse=True)
def begun(tmp_path_factory):
    """The jobs that wait for ten seconds and more, all begun before the first test: each by its `WHAT`."""
    with contextlib.ExitStack() as open_:
        jobs = (("linger", 1, 2), ("stop", 2, 3), ("sleep", 1, 3))
        yield {
            what: open_.enter_context(job(tmp_path_factory.mktemp(what), what, at_fault, count=count))
            for what, at_fault, count in jobs
        }


def test_a_job_whose_processes_all_end_well_says_nothing(tmp_path):
    with job(tmp_path, "end", 0) as processes:
        assert [one.wait() for one in processes] == [0, 0, 0]
        assert [errors(one) for one in processes] == [[], [], []]


@pytest.mark.parametrize("at_fault", [0, 2])
def test_a_process_that_is_killed_is_named_by_all_others(tmp_path, at_fault):
    with job(tmp_path, "die", at_fault) as processes:
        codes, _ = ended(processes)
        assert codes[at_fault] == -9
        for index, process in enumerate(processes):
            if index != at_fault:
                assert codes[index] not in (0, 2, 75)
                (said,) = errors(process)
                pid = processes[at_fault].process.pid
                assert re.search(rf"process {at_fault} \(.*, pid {pid}\) was lost: its connection has closed", said)


@pytest.mark.parametrize("at_fault", [0, 2])
def test_a_process_that_fails_alone_tells_the_others_why(tmp_path, at_fault):
    with job(tmp_path, "fail", at_fault) as processes:
        codes, _ = ended(processes)
        assert codes == [2, 2, 2]  # nobody need try again: it is a mistake in what was asked
        for index, process in enumerate(processes):
            (said,) = errors(process)
            told = f"process {at_fault} \\(.*\\) failed: " if index != at_fault else ""
            assert re.fullmatch(f"error: {told}data.path: this host has no such folder", said)


def test_running_out_of_memory_is_said_at_once_and_to_all(tmp_path):
    with job(tmp_path, "exhaust", 1, count=2) as processes:
        codes, _ = ended(processes)
        assert codes == [1, 1]
        assert "RESOURCE_EXHAUSTED: Out of memory" in processes[1].said()
        assert not any("waiting to hear" in one.said() for one in processes[1:])
        assert re.search(r"error: process 1 \(.*\) failed: ", processes[0].said())


def test_a_process_whose_words_nobody_can_read_ends_all_the_same(tmp_path):
    common = {"VIT_DIST_COORDINATOR": f"127.0.0.1:{free_port()}", "VIT_DIST_PROCESSES": "2"}
    command = [sys.executable, str(PART), "die", "1"]
    environments = [{**os.environ, **common, "VIT_DIST_PROCESS": str(index)} for index in range(2)]
    with open("/dev/full", "w") as full:
        first, second = (
            subprocess.Popen(command, env=one, stdout=subprocess.DEVNULL, stderr=full) for one in environments
        )
    try:
        assert (first.wait(60), second.wait(60)) == (1, -9)
    finally:
        first.kill(), second.kill()


def test_a_process_that_crashes_shows_its_own_traceback_and_the_others_name_it(tmp_path):
    with job(tmp_path, "crash", 1) as processes:
        codes, _ = ended(processes)
        assert codes == [1, 1, 1]
        assert "ZeroDivisionError: a mistake in the program" in processes[1].said()
        for process in (processes[0], processes[2]):
            assert re.search(r"error: process 1 \(.*\) failed: an error of the program", process.said())
            assert "Traceback" not in process.said()


def test_processes_that_do_not_come_are_named(tmp_path):
    with job(tmp_path, "end", 0, count=4, come=(0, 2), START_SECONDS="3") as processes:
        codes, _ = ended(processes)
        assert codes == [1, 1]
        for process in processes:
            (said,) = errors(process)
            assert re.search(r"processes 1, 3 of 4 did not come to 127.0.0.1:\d+ within 3 s", said)


def test_a_first_process_that_does_not_come_is_named(tmp_path):
    with job(tmp_path, "end", 0, come=(1,), START_SECONDS="3") as (process,):
        assert process.wait() == 1
        (said,) = errors(process)
        assert re.search(r"process 0 was not there at 127.0.0.1:\d+ for 3 s \(Connection refused\)", said)


def test_two_processes_of_one_number_are_refused(tmp_path):
    with job(tmp_path, "end", 0, come=(0, 1, 1)) as processes:
        codes, _ = ended(processes)
        assert codes == [1, 1, 1]
        assert all("process 1 has come twice, from process 1 (" in errors(one)[0] for one in processes)


# Those that are begun before all others


def test_a_process_that_is_stuck_is_named_with_what_it_was_doing(begun):
    processes = begun["sleep"]
    codes, _ = ended(processes)
    assert codes == [1, 1, 1]
    for process in processes:
        (said,) = errors(process)
        assert re.search(
            r"no process has come further for \d+ s, since step 2 began; process 1( \(.*\))? did not come", said
        )
    assert 'part.py", line' in processes[1].said() and "in sleep" in processes[1].said()


def test_a_process_that_opens_its_data_for_long_is_not_taken_for_stuck(begun):
    assert [one.wait() for one in begun["linger"]] == [0, 0]
    assert [errors(one) for one in begun["linger"]] == [[], []]


def test_a_process_that_falls_silent_is_named_by_all_others(begun):
    others = begun["stop"][:2]
    codes, _ = ended(others)
    assert codes == [1, 1]
    for process in others:
        (said,) = errors(process)
        assert re.search(r"process 2 \(.*\) was lost: it has said nothing for \d+ s, .*deadlines.peer_seconds", said)

"""However one process of a job is lost, the others end soon and report which one it was and why."""

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

PEER = Path(__file__).with_name("peer.py")
QUICK = 40  # seconds in which all must have ended, on a busy machine


@contextlib.contextmanager
def job(folder, what, at_fault, *, count=3, indices=None, **variables):
    """The processes of a job of `count`, of which only those in `indices` (all) are started; see `peer.py`."""
    common = {"VIT_DIST_COORDINATOR": f"127.0.0.1:{free_port()}", "VIT_DIST_PROCESSES": str(count), **variables}
    with contextlib.ExitStack() as open_:
        yield [
            open_.enter_context(
                started(
                    [sys.executable, str(PEER), what, str(at_fault)],
                    folder / str(number),
                    VIT_DIST_PROCESS=str(index),
                    **common,
                )
            )
            for number, index in enumerate(indices or range(count))
        ]


def errors(process):
    return [line for line in process.said().splitlines() if line.startswith("error: ")]


def ended(processes):
    """Waits for all; returns their exit codes, and the seconds from the end of the first until that of the last."""
    first = None
    while first is None or any(running.process.poll() is None for running in processes):
        if first is None and any(running.process.poll() is not None for running in processes):
            first = time.monotonic()
        assert first is None or time.monotonic() < first + QUICK, [running.said()[-1000:] for running in processes]
        time.sleep(0.02)
    return [running.process.returncode for running in processes], time.monotonic() - first


@pytest.fixture(scope="module", autouse=True)
def begun(tmp_path_factory):
    """The jobs that wait for ten seconds and more, by WHAT; all are started before the first test."""
    with contextlib.ExitStack() as open_:
        jobs = (("linger", 1, 2), ("stop", 2, 3), ("sleep", 1, 3))
        yield {
            what: open_.enter_context(job(tmp_path_factory.mktemp(what), what, at_fault, count=count))
            for what, at_fault, count in jobs
        }


def test_a_job_whose_processes_all_end_well_prints_no_error(tmp_path):
    with job(tmp_path, "end", 0) as processes:
        assert [process.wait() for process in processes] == [0, 0, 0]
        assert [errors(process) for process in processes] == [[], [], []]


@pytest.mark.parametrize("at_fault", [0, 2])
def test_a_process_that_is_killed_is_named_by_all_others(tmp_path, at_fault):
    with job(tmp_path, "die", at_fault) as processes:
        codes, _ = ended(processes)
        assert codes[at_fault] == -9
        for index, process in enumerate(processes):
            if index != at_fault:
                assert codes[index] not in (0, 2, 75)
                (error,) = errors(process)
                pid = processes[at_fault].process.pid
                assert re.search(rf"process {at_fault} \(.*, pid {pid}\) was lost: its connection has closed", error)


@pytest.mark.parametrize("at_fault", [0, 2])
def test_a_process_that_fails_alone_tells_the_others_why(tmp_path, at_fault):
    with job(tmp_path, "fail", at_fault) as processes:
        codes, _ = ended(processes)
        assert codes == [2, 2, 2]  # a usage error: another start would end in the same way
        for index, process in enumerate(processes):
            (error,) = errors(process)
            source = f"process {at_fault} \\(.*\\) failed: " if index != at_fault else ""
            assert re.fullmatch(f"error: {source}data.path: this host has no such folder", error)


def test_running_out_of_memory_is_reported_at_once_and_to_all(tmp_path):
    with job(tmp_path, "exhaust", 1, count=2) as processes:
        codes, _ = ended(processes)
        assert codes == [1, 1]
        assert "RESOURCE_EXHAUSTED: Out of memory" in processes[1].said()
        assert not any("checking whether" in process.said() for process in processes[1:])
        assert re.search(r"error: process 1 \(.*\) failed: ", processes[0].said())


def test_a_process_that_cannot_print_why_it_ends_still_ends(tmp_path):
    common = {"VIT_DIST_COORDINATOR": f"127.0.0.1:{free_port()}", "VIT_DIST_PROCESSES": "2"}
    command = [sys.executable, str(PEER), "die", "1"]
    environments = [{**os.environ, **common, "VIT_DIST_PROCESS": str(index)} for index in range(2)]
    with open("/dev/full", "w") as full:
        first, second = (
            subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=full)
            for environment in environments
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
            assert re.search(r"error: process 1 \(.*\) failed: an unexpected error", process.said())
            assert "Traceback" not in process.said()


def test_processes_that_do_not_connect_are_named(tmp_path):
    with job(tmp_path, "end", 0, count=4, indices=(0, 2), START_SECONDS="3") as processes:
        codes, _ = ended(processes)
        assert codes == [1, 1]
        for process in processes:
            (error,) = errors(process)
            assert re.search(r"processes 1, 3 of 4 did not connect to 127.0.0.1:\d+ within 3 s", error)


def test_a_missing_process_0_is_named(tmp_path):
    with job(tmp_path, "end", 0, indices=(1,), START_SECONDS="3") as (process,):
        assert process.wait() == 1
        (error,) = errors(process)
        assert re.search(r"process 0 did not answer at 127.0.0.1:\d+ for 3 s \(Connection refused\)", error)


def test_two_processes_with_the_same_number_are_refused(tmp_path):
    with job(tmp_path, "end", 0, indices=(0, 1, 1)) as processes:
        codes, _ = ended(processes)
        assert codes == [1, 1, 1]
        assert all("process 1 has connected twice, from process 1 (" in errors(process)[0] for process in processes)


# The jobs that are started before the first test


def test_a_stuck_process_is_named_with_the_stacks_of_its_threads(begun):
    processes = begun["sleep"]
    codes, _ = ended(processes)
    assert codes == [1, 1, 1]
    for process in processes:
        (error,) = errors(process)
        assert re.search(
            r"no process has made progress for \d+ s, since step 2 began; process 1( \(.*\))? did not get past", error
        )
    assert 'peer.py", line' in processes[1].said() and "in sleep" in processes[1].said()


def test_a_process_that_takes_long_to_open_its_data_is_not_taken_for_stuck(begun):
    assert [process.wait() for process in begun["linger"]] == [0, 0]
    assert [errors(process) for process in begun["linger"]] == [[], []]


def test_a_silent_process_is_named_by_all_others(begun):
    others = begun["stop"][:2]
    codes, _ = ended(others)
    assert codes == [1, 1]
    for process in others:
        (error,) = errors(process)
        assert re.search(r"process 2 \(.*\) was lost: it has sent nothing for \d+ s, .*deadlines.peer_seconds", error)

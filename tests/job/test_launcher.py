"""The launcher over small processes: what it prints, which process it blames, what it ends, when it starts again."""

import contextlib
import os
import re
import signal
import socket
import sys
import time

import pytest
from pids import alive, wait_until_gone
from system import ROOT, Running, run, started, until

from vit_dist import cli
from vit_dist.config import ConfigError
from vit_dist.job import launcher as launcher_module
from vit_dist.job.launcher import Job, count_gpus, verb_command

HOST = socket.gethostname()
RANK = "import os, signal, subprocess, sys, time; rank = int(os.environ['VIT_DIST_PROCESS']); "
LAUNCH = """
import sys
from vit_dist.job import child, launcher as launch
launch.SIGTERM_SECONDS, launch.SIGKILL_SECONDS, launch.STRAGGLER_SECONDS = {last_words}, {grace}, {straggler}
child.HOLD_SECONDS = {hold}
sys.exit(launch.launch(launch.Job((sys.executable, "-c", {code!r}), **{options!r})))
"""


def launcher(code, processes=4, last_words=0.2, grace=1.0, straggler=60.0, hold=60.0, **options):
    """Returns the command of a launcher of processes that run `code`, in which `rank` is the process's number."""
    options = {"processes": processes, **options}
    seconds = {"last_words": last_words, "grace": grace, "straggler": straggler, "hold": hold}
    return [sys.executable, "-c", LAUNCH.format(**seconds, code=RANK + code, options=options)]


def launched(tmp_path, code, processes=4, **options):
    """Runs a launcher to its end; returns (exit code, its stdout, its stderr)."""
    number, running = run(launcher(code, processes, **options), tmp_path / "launcher")
    return number, running.stdout.read_text(), running.said()


def printed_pids(running: Running, count: int, mark: str = "pid") -> list[int]:
    """Waits until `count` processes have printed `pid 123` on stderr; returns the numbers."""
    printed = re.compile(rf"^\[\d\] {mark} (\d+)$", re.MULTILINE)
    until(lambda: len(printed.findall(running.said())) >= count, running)
    return [int(number) for number in printed.findall(running.said())]


# Output


def test_100_000_lines_of_four_processes_stay_whole_and_in_the_order_of_each_process(tmp_path):
    code = (
        "[print(number, 'x' * (number % 97), file=sys.stderr if number % 2 else sys.stdout, flush=number % 100 == 0)"
        " for number in range(25000)]"
    )
    number, out, err = launched(tmp_path, code)
    assert number == 0
    numbers: dict[int, dict[int, list[int]]] = {rank: {0: [], 1: []} for rank in range(4)}
    for line in [*(f"[0] {line}" for line in out.splitlines()), *err.splitlines()]:
        prefix, number, filling = re.fullmatch(r"\[(\d)\] (\d+) (x*)", line).groups()
        assert len(filling) == int(number) % 97
        numbers[int(prefix)][int(number) % 2].append(int(number))
    for rank in numbers:
        assert numbers[rank] == {0: list(range(0, 25000, 2)), 1: list(range(1, 25000, 2))}


def test_stdout_is_that_of_process_0_alone(tmp_path):
    code, out, err = launched(tmp_path, "print('result of', rank); print('word of', rank, file=sys.stderr)", 3)
    assert (code, out) == (0, "result of 0\n")
    expected = ["[0] word of 0", "[1] result of 1", "[1] word of 1", "[2] result of 2", "[2] word of 2"]
    assert sorted(err.splitlines()) == expected


def test_carriage_returns_end_lines_bytes_are_escaped_and_a_last_line_needs_no_end(tmp_path):
    code = r"os.write(2, b'10%\r'); time.sleep(0.2); os.write(2, b'20%\r\n\nbad \xff\xc3\xa9\rno end')"
    code, out, err = launched(tmp_path, code, 1)
    assert (code, out, err) == (0, "", "[0] 10%\n[0] 20%\n[0] \n[0] bad \\xffé\n[0] no end\n")


def test_bytes_of_a_result_are_unchanged_and_its_last_line_is_ended(tmp_path):
    number, running = run(launcher(r"os.write(1, b'bad \xff\n{}')", 1), tmp_path / "launcher")
    assert (number, running.stdout.read_bytes()) == (0, b"bad \xff\n{}\n")


def test_a_line_without_an_end_is_cut_rather_than_kept_in_memory(tmp_path):
    code, _, err = launched(tmp_path, "os.write(2, b'x' * 5_000_000)", 1)
    lines = err.splitlines()
    assert code == 0 and sum(line.count("x") for line in lines) == 5_000_000
    assert max(map(len, lines)) < 1_200_000


def test_a_job_goes_on_when_nobody_reads_its_output(tmp_path):
    mark = tmp_path / "done"
    command = launcher(f"[print('x' * 999, file=sys.stderr) for _ in range(500)]; open('{mark}', 'w')", 1)
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(os.posix_spawn(
            command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writer, 2)]), 0)[1]) == 0  # fmt: skip
    finally:
        os.close(writer)
    assert mark.exists()


# Usage errors

PRINTS = "print({!r}, file=sys.stderr); sys.exit({})"


def test_a_usage_error_of_all_processes_is_printed_once_and_no_other_line_is_lost(tmp_path):
    code = "print('log', rank, file=sys.stderr); time.sleep(0.3 * rank); " + PRINTS.format("error: lr: below 0", 2)
    code, out, err = launched(tmp_path, code, 3, last_words=60.0, grace=60.0)
    assert (code, out) == (2, "")
    assert sorted(err.splitlines()) == ["[0] log 0", "[1] log 1", "[2] log 2", "error: lr: below 0"]


def test_a_usage_error_is_printed_once_when_the_launcher_ends_a_slow_process(tmp_path):
    code = "time.sleep(60) if rank == 1 else None; " + PRINTS.format("error: lr: below 0", 2)
    assert launched(tmp_path, code, 3) == (2, "", "error: lr: below 0\n")


def test_usage_errors_that_differ_are_all_printed_and_the_first_process_is_blamed(tmp_path):
    code = "time.sleep(0.5 * rank); print('error: no folder', rank, file=sys.stderr); sys.exit(2)"
    code, _, err = launched(tmp_path, code, 2, last_words=60.0, grace=60.0)
    assert code == 2
    *lines, blamed, last = err.splitlines()
    assert lines == ["[0] error: no folder 0", "[1] error: no folder 1"]
    assert blamed.startswith("error: process 0 of 2 (") and last == "    error: no folder 0"


def test_an_error_line_of_a_process_that_ends_with_another_code_is_printed(tmp_path):
    code, _, err = launched(tmp_path, PRINTS.format("error: no memory", 1), 1)
    assert code == 1 and err.splitlines()[0] == "[0] error: no memory"


def test_an_error_line_is_printed_when_another_follows_it_or_its_process_runs_on(tmp_path):
    code = "print('error: a\\nb', file=sys.stderr); time.sleep(0.5); " + PRINTS.format("error: c", 0)
    assert launched(tmp_path, code, 1) == (0, "", "[0] error: a\n[0] b\n[0] error: c\n")
    stays = "print('pid', os.getpid(), file=sys.stderr); print('error: a', file=sys.stderr); time.sleep(60)"
    with started(launcher(stays, 1, hold=0.1), tmp_path / "stays") as running:
        until(lambda: "[0] error: a\n" in running.said(), running)


@pytest.mark.skipif(sys.platform != "linux", reason="lists the open files in /proc")
def test_a_launcher_that_raises_leaves_no_file_open(monkeypatch):
    def open_files():
        return sorted(os.listdir("/proc/self/fd"))

    before = open_files()
    with pytest.raises(FileNotFoundError):
        launcher_module.launch(Job(("no-such-command",), 2))
    assert open_files() == before

    def interrupt(attempt, running):
        raise KeyError("a mistake in the launcher")

    monkeypatch.setattr(launcher_module._Attempt, "_look_for_failures", interrupt)
    with pytest.raises(KeyError):
        launcher_module.launch(Job((sys.executable, "-c", "import time; time.sleep(60)"), 2))
    assert open_files() == before


# Which process failed


def test_the_first_process_that_fails_ends_the_others_and_is_named_with_host_code_and_last_lines(tmp_path):
    code = "time.sleep(60) if rank != 2 else [print('line', n, file=sys.stderr) for n in range(99)] and sys.exit(3)"
    started_at = time.monotonic()
    number, out, err = launched(tmp_path, code)
    assert time.monotonic() - started_at < 10
    assert (number, out) == (1, "")
    assert re.search(
        rf"^launch: process 2 of 4 \(on {HOST}, pid \d+\) failed with code 3; ending the others$", err, re.M
    )
    last = err[err.index("error: ") :].splitlines()
    assert re.fullmatch(rf"error: process 2 of 4 \(on {HOST}, pid \d+\) failed with code 3; .*:", last[0])
    assert last[1:] == [f"    line {n}" for n in range(79, 99)]


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace_period(tmp_path):
    code = (
        "signal.signal(signal.SIGTERM, lambda *_: print('no', file=sys.stderr));"
        "print('pid', os.getpid(), file=sys.stderr); [time.sleep(1) for _ in range(60)]"
    )
    with started(launcher(code, 3, grace=2.0), tmp_path / "launcher") as running:
        numbers = printed_pids(running, 3)
        os.kill(numbers[1], signal.SIGKILL)
        assert running.wait(10) == 1
    assert running.said().count("] no\n") == 2
    assert f"pid {numbers[1]}) was ended by SIGKILL; " in running.said()
    assert not any(map(alive, numbers))


def test_a_process_killed_by_sigkill_is_named_and_its_own_processes_end_too(tmp_path):
    code = (
        "worker = subprocess.Popen(['sleep', '60']); print('pid', os.getpid(), file=sys.stderr);"
        "print('worker', worker.pid, file=sys.stderr); time.sleep(60)"
    )
    with started(launcher(code, 3), tmp_path / "launcher") as running:
        workers, numbers = printed_pids(running, 3, "worker"), printed_pids(running, 3)
        assert all(map(alive, workers))
        os.kill(numbers[1], signal.SIGKILL)
        killed = time.monotonic()
        assert running.wait(10) == 1
        wait_until_gone([*workers, *numbers])
        assert time.monotonic() - killed < 10
    rank = re.search(rf"\[(\d)\] pid {numbers[1]}$", running.said(), re.MULTILINE)[1]
    assert f"error: process {rank} of 3 (on {HOST}, pid {numbers[1]}) was ended by SIGKILL; " in running.said()


WATCHED = """
from vit_dist.config import Deadlines
from vit_dist.job.rendezvous import rendezvous
from vit_dist.job.rank import find_rank
from vit_dist.job.watchdog import Watchdog
watchdog = Watchdog(rank, rendezvous(find_rank(60), 60, b""), Deadlines(peer_seconds=2, step_seconds=3))
{then}
watchdog.alive(2)
time.sleep(60)
"""


STOPS = "os.kill(os.getpid(), signal.SIGSTOP)"
FAILS = "watchdog.report_failure('no space', 1); print('error: no space', file=sys.stderr); sys.exit(1)"


BLAMED = {
    "process 0 fails": (0, FAILS, "failed with code 1"),
    "process 2 fails": (2, FAILS, "failed with code 1"),
    "process 0 is killed": (0, "os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL"),
    "process 2 is cut off": (2, STOPS, "had to be killed"),
    "process 2 is stuck": (2, "watchdog.alive(1); time.sleep(60)", "failed with code 1"),
}
CRASHES = ("sys.exit(75)", "sys.exit(1)", "os.abort()")
CRASHES_TWICE = (
    "file = f'FOLDER/{{rank}}-'; tries = sum(os.path.exists(f'{{file}}{{n}}') for n in range(9));"
    "open(f'{{file}}{{tries}}', 'w').write(os.environ['VIT_DIST_COORDINATOR']);"
    "time.sleep(0.5); {how} if rank == 1 and tries < 2 else 0; print('tries', tries)"
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(the launcher, its folder) of each of `BLAMED` and `CRASHES`, all started at once: they mostly wait."""
    with contextlib.ExitStack() as opened:

        def start(code, processes, **options):
            folder = tmp_path_factory.mktemp("begun")
            code = code.replace("FOLDER", str(folder))
            return opened.enter_context(started(launcher(code, processes, **options), folder / "launcher")), folder

        yield {
            name: start("\n" + WATCHED.format(then=f"if rank == {rank}: {then}"), 3, last_words=1.0, grace=6.0)
            for name, (rank, then, _) in BLAMED.items()
        } | {how: start(CRASHES_TWICE.format(how=how), 2, restarts=5) for how in CRASHES}


@pytest.mark.parametrize("case", BLAMED)
def test_peers_that_end_because_another_has_failed_are_not_blamed(case, begun):
    """Process 0 ends last even if it is at fault, and a process that hangs never ends by itself."""
    (rank, then, how), running = BLAMED[case], begun[case][0]
    assert running.wait(60) == 1
    err = running.said()
    blamed, *last = err[err.index("\nerror: ") + 1 :].splitlines()
    assert blamed.startswith(f"error: process {rank} of 3 (on {HOST}, pid ") and how in blamed
    if then == FAILS:
        assert last == ["    error: no space"]


# Exit codes and restarts


@pytest.mark.parametrize(
    "codes, expected",
    [
        ((0, 0, 0), 0),
        ((75, 75, 75), 75),
        ((0, 75, 0), 75),
        ((2, 2, 2), 2),
        ((1, 1, 1), 1),
        ((75, 75, 9), 1),
        ((130, 130, 130), 130),
    ],
)
def test_the_exit_code_follows_from_those_of_the_processes(codes, expected, tmp_path):
    assert launched(tmp_path, f"sys.exit({codes}[rank])", 3)[0] == expected


@pytest.mark.parametrize("code", [0, 2, 130])
def test_a_job_that_is_done_or_wrong_or_interrupted_is_not_started_again(code, tmp_path):
    result, _, err = launched(tmp_path, f"sys.exit({code})", 2, restarts=3)
    assert result == code and "starting again" not in err


@pytest.mark.parametrize("how", CRASHES)
def test_all_are_started_again_after_a_preemption_or_crash_until_the_job_is_done(how, begun):
    """Each start leaves a file; the third succeeds. Every start has a coordinator address of its own."""
    running, folder = begun[how]
    assert running.wait(60) == 0 and running.stdout.read_text().splitlines()[-1] == "tries 2"
    why = "was preempted" if "75" in how else "failed"
    assert [line for line in running.said().splitlines() if "starting again" in line] == [
        f"launch: the job {why}; starting again in 1 s (restart 1 of 5)",
        f"launch: the job {why}; starting again in 2 s (restart 2 of 5)",
    ]
    addresses = [{(folder / f"{rank}-{tries}").read_text() for rank in (0, 1)} for tries in (0, 1, 2)]
    assert all(len(of_start) == 1 for of_start in addresses) and len(set.union(*addresses)) == 3


def test_a_job_that_always_fails_is_given_up_after_its_restarts(tmp_path):
    number, _, err = launched(tmp_path, "sys.exit(7)", 1, restarts=1)
    assert number == 1 and err.count("error: process 0 of 1") == 2 and err.count("starting again") == 1


# Signals


SAVES = (
    "signal.signal(signal.SIGTERM, lambda *_: (print('saved', file=sys.stderr), sys.exit(75)));"
    "print('pid', os.getpid(), file=sys.stderr); time.sleep(60)"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_reaches_all_which_save_and_the_job_ends_with_75_and_is_not_started_again(number, tmp_path):
    with started(launcher(SAVES, 3, restarts=3), tmp_path / "launcher") as running:
        numbers = printed_pids(running, 3)
        running.process.send_signal(number)
        assert running.wait(20) == 75
    assert sorted(re.findall(r"\[(\d)\] saved", running.said())) == ["0", "1", "2"]
    assert "starting again" not in running.said() and "error" not in running.said()
    assert not any(map(alive, numbers))


def test_a_signal_that_arrives_while_another_is_forwarded_is_not_lost(monkeypatch):
    received, sent = [signal.SIGTERM], []

    def send(children, number):
        sent.append(number)
        received.extend([signal.SIGINT] if len(sent) == 1 else [])

    attempt = launcher_module._Attempt(Job(("x",), 1), received)
    monkeypatch.setattr(attempt, "_signal", send)
    attempt._forward_signals([])
    assert sent == [signal.SIGTERM, signal.SIGINT]


def test_sigterm_while_waiting_to_start_again_ends_the_wait(tmp_path):
    with started(launcher("sys.exit(75)", 1, restarts=9), tmp_path / "launcher") as running:
        until(lambda: "starting again in 4 s" in running.said(), running)
        running.process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        assert running.wait(20) == 75
    assert time.monotonic() - signalled < 2


def test_a_job_that_failed_and_is_told_to_stop_before_its_restart_may_be_started_again(tmp_path):
    with started(launcher("sys.exit(7)", 1, restarts=9), tmp_path / "launcher") as running:
        until(lambda: "starting again in 4 s" in running.said(), running)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(20) == 75


def test_processes_that_sigterm_ends_before_they_answer_it_have_not_failed(tmp_path):
    with started(launcher("print('pid', os.getpid(), file=sys.stderr); time.sleep(60)", 2), tmp_path / "l") as running:
        printed_pids(running, 2)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(20) == 75
    assert "error" not in running.said() and "launch: " not in running.said()


def test_ctrl_c_reaches_all_once_and_the_job_ends_with_130_blaming_nobody(tmp_path):
    code = (
        "signal.signal(signal.SIGINT, lambda *_: (print('interrupted', file=sys.stderr), sys.exit(130)));"
        "print('pid', os.getpid(), file=sys.stderr); time.sleep(60)"
    )
    with started(launcher(code, 3, restarts=3), tmp_path / "launcher") as running:
        printed_pids(running, 3)
        running.process.send_signal(signal.SIGINT)
        assert running.wait(20) == 130
    assert sorted(re.findall(r"\[(\d)\] interrupted", running.said())) == ["0", "1", "2"]
    assert "error" not in running.said()


def test_a_process_that_runs_on_when_the_others_have_ended_well_is_killed(tmp_path):
    code, _, err = launched(tmp_path, "time.sleep(600 if rank == 2 else 0)", 3, straggler=1.0)
    assert code == 1
    assert re.search(r"error: process 2 of 3 \(on .*\) had to be killed", err)


def test_a_failure_on_another_host_is_reported_in_the_words_of_this_hosts_processes(tmp_path):
    lost = "process 0 (host-a, 10.0.0.1, pid 7) was lost: it has sent nothing for 60 s"
    code, _, err = launched(
        tmp_path,
        f"from vit_dist.job.blame import Blame; Blame(0, {lost!r}).report(); sys.exit(1)",
        1,
        nodes=2,
        node_rank=1,
        coordinator="a:1",
    )
    assert code == 1
    assert re.search(
        rf"^error: {re.escape(lost)}; reported by process 1 of 2 \(on .*\), which failed with code 1$", err, re.M
    )


def test_a_second_ctrl_c_kills_at_once(tmp_path):
    code = (
        "signal.signal(signal.SIGINT, lambda *_: print('not yet', file=sys.stderr));"
        "print('pid', os.getpid(), file=sys.stderr); [time.sleep(1) for _ in range(60)]"
    )
    with started(launcher(code, 2, grace=60.0), tmp_path / "launcher") as running:
        numbers = printed_pids(running, 2)
        running.process.send_signal(signal.SIGINT)
        until(lambda: running.said().count("not yet") == 2, running)
        running.process.send_signal(signal.SIGINT)
        assert running.wait(10) == 130
    assert not any(map(alive, numbers))


def test_a_terminal_s_ctrl_c_reaches_the_launcher_alone(tmp_path):
    assert launched(tmp_path, "print(os.getsid(0) == os.getpid() == os.getpgid(0))", 1)[1] == "True\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_the_processes_of_a_launcher_that_was_killed_do_not_live_on(tmp_path):
    with started(
        launcher("print('pid', os.getpid(), file=sys.stderr); time.sleep(60)"), tmp_path / "launcher"
    ) as running:
        numbers = printed_pids(running, 4)
        assert all(map(alive, numbers))
        running.process.kill()
        running.wait()
        wait_until_gone(numbers)


# Arguments


def test_processes_are_numbered_over_all_hosts_and_take_a_gpu_each_or_fake_devices(monkeypatch):
    monkeypatch.setenv("VIT_DIST_LOCAL_PROCESS", "7")
    monkeypatch.setenv("SOME_OTHER", "kept")
    real = Job(("x",), 4, nodes=3, node_rank=2, coordinator="node0:29500")
    assert list(real.indices) == [8, 9, 10, 11]
    expected = {
        "VIT_DIST_COORDINATOR": "node0:29500",
        "VIT_DIST_PROCESSES": "12",
        "VIT_DIST_PROCESS": "9",
        "VIT_DIST_LOCAL_PROCESS": "1",
        "VIT_DIST_JOB_SECRET": "secret",
        "SOME_OTHER": "kept",
    }
    assert {**real.environment(9, "node0:29500", "secret"), **expected} == real.environment(9, "node0:29500", "secret")
    fake = Job(("x",), 2, devices_per_process=3).environment(1, "127.0.0.1:5", "")
    assert fake["VIT_DIST_FAKE_DEVICES"] == "3" and "VIT_DIST_LOCAL_PROCESS" not in fake


def test_each_start_on_one_host_has_a_secret_of_its_own_and_nodes_share_the_one_that_is_set(tmp_path, monkeypatch):
    monkeypatch.delenv("VIT_DIST_JOB_SECRET", raising=False)
    code = "print(os.environ.get('VIT_DIST_JOB_SECRET', 'none'), file=sys.stderr); sys.exit(75 if rank == 0 else 0)"
    _, _, err = launched(tmp_path, code, 2, restarts=1)
    secrets = re.findall(r"^\[(\d)\] ([0-9a-f]{64})$", err, re.MULTILINE)
    assert len(secrets) == 4 and len({secret for _, secret in secrets}) == 2
    nodes = {"nodes": 2, "node_rank": 0, "coordinator": "a:1"}
    assert launched(tmp_path, code, 1, **nodes)[2] == "[0] none\n"
    monkeypatch.setenv("VIT_DIST_JOB_SECRET", "0123456789abcdef")
    assert launched(tmp_path, code, 1, **nodes)[2] == "[0] 0123456789abcdef\n"


@pytest.mark.parametrize("between", [["--"], []])
def test_the_verb_and_its_arguments_are_passed_on_untouched(between, monkeypatch):
    jobs = []
    monkeypatch.setattr("vit_dist.job.launcher.launch", lambda job: jobs.append(job) or 75)
    verb = ["train", "--config=a b.py", "--config.mesh.data=-1", "--config.seed", "3", "--", "--restarts=9"]
    assert cli.main(["launch", "--processes=2", "--devices-per-process", "4", "--restarts=5", *between, *verb]) == 75
    assert jobs == [Job((sys.executable, "-m", "vit_dist", *verb), 2, devices_per_process=4, restarts=5)]


@pytest.mark.parametrize(
    "words, error",
    [
        ("--processes=2", "no verb is given"),
        ("--processes=2 --", "no verb is given"),
        ("--processes=2 -- trian", "did you mean train"),
        ("--processes=2 -- launch -- train", "'launch' is none of train, eval, predict, features, probe, bench"),
        ("--processes=2 -- configs", "'configs' is none of"),
        ("--processes=2 -- --config=x.py", "'--config=x.py' is none of"),
        ("--processes=2 trian", "unrecognized arguments: trian"),
        ("--processes=0 -- train", "expected a whole number above 0, found '0'"),
        ("--processes=2 --restarts=-1 -- train", "expected a whole number, found '-1'"),
        ("--processes=2 --devices-per-process=0 -- train", "expected a whole number above 0"),
        ("--processes=2 --config.seed=1 -- train", "come after --"),
        ("--processes=2 --node-rank=0 -- train", "--nodes and --node-rank are given together"),
        ("--processes=2 --nodes=2 -- train", "--nodes and --node-rank are given together"),
        ("--processes=2 --nodes=2 --node-rank=1 -- train", "also give --coordinator=HOST:PORT"),
        ("--processes=2 --nodes=2 --node-rank=2 --coordinator=a:1 -- train", "expected 0 to 1"),
        ("--processes=2 --nodes=2 --node-rank=0 --coordinator=a -- train", "expected HOST:PORT"),
        ("--processes=2 --coordinator=a:99999 -- train", "expected HOST:PORT"),
    ],
)
def test_arguments_that_make_no_sense_are_named_in_one_line(words, error, capsys, monkeypatch):
    monkeypatch.setattr("vit_dist.job.launcher.launch", lambda job: pytest.fail(f"{job} was started"))
    try:
        assert cli.main(["launch", *words.split()]) == 2
    except SystemExit as exit_:  # argparse's own
        assert exit_.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert error in err


def test_as_many_processes_are_started_as_gpus_are_seen(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-a)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-b)'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert count_gpus() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert count_gpus() == 3
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match="launch --processes: .* say how many"):
        count_gpus()


def test_the_command_of_a_verb_runs_this_package_by_this_python():
    assert verb_command(["eval", "--workdir=d"]) == (sys.executable, "-m", "vit_dist", "eval", "--workdir=d")


def test_the_launcher_never_starts_jax():
    code = "import sys, vit_dist.job.launcher, vit_dist.cli; print('jax' in sys.modules)"
    assert os.popen(f'cd {ROOT} && {sys.executable} -c "{code}"').read() == "False\n"

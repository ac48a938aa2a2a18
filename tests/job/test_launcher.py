"""The launcher over small processes: what it prints, whom it blames, whom it ends, and when it starts again."""

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
from vit_dist.job.launcher import Job, count_gpus, verb_command

HOST = socket.gethostname()
RANK = "import os, signal, subprocess, sys, time; rank = int(os.environ['VIT_DIST_PROCESS']); "
LAUNCH = """
import sys
from vit_dist.job import launcher as launch
launch.LAST_WORDS_SECONDS, launch.GRACE_SECONDS, launch.STRAGGLER_SECONDS = {last_words}, {grace}, {straggler}
sys.exit(launch.launch(launch.Job((sys.executable, "-c", {code!r}), **{options!r})))
"""


def launcher(code, processes=4, last_words=0.2, grace=1.0, straggler=60.0, **options):
    """The command of a launcher of processes that run `code`, in which `rank` is the process's number."""
    options = {"processes": processes, **options}
    times = {"last_words": last_words, "grace": grace, "straggler": straggler}
    return [sys.executable, "-c", LAUNCH.format(**times, code=RANK + code, options=options)]


def launched(tmp_path, code, processes=4, **options):
    """A launcher run to its end: (exit code, what it printed on stdout, on stderr)."""
    number, running = run(launcher(code, processes, **options), tmp_path / "launcher")
    return number, running.stdout.read_text(), running.said()


def printed_pids(running: Running, count: int, mark: str = "pid") -> list[int]:
    """The numbers that so many processes print on stderr as `pid 123`, waited for."""
    printed = re.compile(rf"^\[\d\] {mark} (\d+)$", re.MULTILINE)
    until(lambda: len(printed.findall(running.said())) >= count, running)
    return [int(number) for number in printed.findall(running.said())]


# What is printed


def test_each_of_100_000_lines_of_four_processes_comes_whole_and_in_its_process_s_order(tmp_path):
    code = (
        "[print(number, 'x' * (number % 97), file=sys.stderr if number % 2 else sys.stdout, flush=number % 100 == 0)"
        " for number in range(25000)]"
    )
    number, out, err = launched(tmp_path, code)
    assert number == 0
    found: dict[int, dict[int, list[int]]] = {rank: {0: [], 1: []} for rank in range(4)}
    for line in [*(f"[0] {line}" for line in out.splitlines()), *err.splitlines()]:
        prefix, number, filling = re.fullmatch(r"\[(\d)\] (\d+) (x*)", line).groups()
        assert len(filling) == int(number) % 97
        found[int(prefix)][int(number) % 2].append(int(number))
    for rank in found:
        assert found[rank] == {0: list(range(0, 25000, 2)), 1: list(range(1, 25000, 2))}


def test_stdout_is_that_of_process_0_alone(tmp_path):
    code, out, err = launched(tmp_path, "print('result of', rank); print('word of', rank, file=sys.stderr)", 3)
    assert (code, out) == (0, "result of 0\n")
    said = ["[0] word of 0", "[1] result of 1", "[1] word of 1", "[2] result of 2", "[2] word of 2"]
    assert sorted(err.splitlines()) == said


def test_carriage_returns_end_lines_bytes_are_escaped_and_a_last_line_needs_no_end(tmp_path):
    code = r"os.write(2, b'10%\r'); time.sleep(0.2); os.write(2, b'20%\r\n\nbad \xff\xc3\xa9\rno end')"
    code, out, err = launched(tmp_path, code, 1)
    assert (code, out, err) == (0, "", "[0] 10%\n[0] 20%\n[0] \n[0] bad \\xffé\n[0] no end\n")


def test_bytes_of_a_result_are_untouched_and_its_last_line_is_ended(tmp_path):
    number, running = run(launcher(r"os.write(1, b'bad \xff\n{}')", 1), tmp_path / "launcher")
    assert (number, running.stdout.read_bytes()) == (0, b"bad \xff\n{}\n")


def test_a_line_without_an_end_is_cut_rather_than_kept(tmp_path):
    code, _, err = launched(tmp_path, "os.write(2, b'x' * 5_000_000)", 1)
    lines = err.splitlines()
    assert code == 0 and sum(line.count("x") for line in lines) == 5_000_000
    assert max(map(len, lines)) < 1_200_000


def test_a_job_goes_on_when_nobody_reads_what_it_says(tmp_path):
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


# Who failed


def test_the_first_that_fails_ends_the_others_and_is_named_with_its_host_code_and_last_lines(tmp_path):
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


def test_one_that_ignores_sigterm_is_killed_once_the_grace_is_over(tmp_path):
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


def test_a_process_killed_by_9_is_named_and_its_own_processes_are_gone_too(tmp_path):
    code = (
        "one = subprocess.Popen(['sleep', '60']); print('pid', os.getpid(), file=sys.stderr);"
        "print('worker', one.pid, file=sys.stderr); time.sleep(60)"
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
mine = find_rank(60)
watch = Watchdog(rank, rendezvous(mine, 60), Deadlines(peer_seconds=2, step_seconds=3))
{then}
watch.alive(2)
time.sleep(60)
"""


STOPS = "os.kill(os.getpid(), signal.SIGSTOP)"
FAILS = "watch.report_failure('no space', 1); print('error: no space', file=sys.stderr); sys.exit(1)"


BLAMED = {
    "process 0 fails": (0, FAILS, "failed with code 1"),
    "process 2 fails": (2, FAILS, "failed with code 1"),
    "process 0 is killed": (0, "os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL"),
    "process 2 is cut off": (2, STOPS, "had to be killed"),
    "process 2 is stuck": (2, "watch.alive(1); time.sleep(60)", "failed with code 1"),
}
CRASHES = ("sys.exit(75)", "sys.exit(1)", "os.abort()")
CRASHES_TWICE = (
    "mine = f'FOLDER/{{rank}}-'; tries = sum(os.path.exists(f'{{mine}}{{n}}') for n in range(9));"
    "open(f'{{mine}}{{tries}}', 'w').write(os.environ['VIT_DIST_COORDINATOR']);"
    "time.sleep(0.5); {how} if rank == 1 and tries < 2 else 0; print('tries', tries)"
)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(the launcher, its folder) of each of `BLAMED` and `CRASHES`, all begun at once: they mostly wait."""
    with contextlib.ExitStack() as open_:

        def start(code, processes, **options):
            folder = tmp_path_factory.mktemp("begun")
            code = code.replace("FOLDER", str(folder))
            return open_.enter_context(started(launcher(code, processes, **options), folder / "launcher")), folder

        yield {
            name: start("\n" + WATCHED.format(then=f"if rank == {rank}: {then}"), 3, last_words=1.0, grace=6.0)
            for name, (rank, then, _) in BLAMED.items()
        } | {how: start(CRASHES_TWICE.format(how=how), 2, restarts=5) for how in CRASHES}


@pytest.mark.parametrize("case", BLAMED)
def test_peers_that_end_because_one_has_failed_are_not_blamed(case, begun):
    """Process 0 outlasts the others even when it is itself at fault, and one that hangs never ends by itself."""
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
def test_what_is_done_mistaken_or_interrupted_is_not_started_again(code, tmp_path):
    found, _, err = launched(tmp_path, f"sys.exit({code})", 2, restarts=3)
    assert found == code and "starting again" not in err


@pytest.mark.parametrize("how", CRASHES)
def test_all_are_started_again_after_a_preemption_or_crash_until_the_job_is_done(how, begun):
    """Each start leaves a file; the third gets through. Every start has a meeting point of its own."""
    running, folder = begun[how]
    assert running.wait(60) == 0 and running.stdout.read_text().splitlines()[-1] == "tries 2"
    why = "was preempted" if "75" in how else "failed"
    assert [line for line in running.said().splitlines() if "starting again" in line] == [
        f"launch: the job {why}; starting again in 1 s (restart 1 of 5)",
        f"launch: the job {why}; starting again in 2 s (restart 2 of 5)",
    ]
    met = [{(folder / f"{rank}-{tries}").read_text() for rank in (0, 1)} for tries in (0, 1, 2)]
    assert all(len(one) == 1 for one in met) and len(set.union(*met)) == 3


def test_a_job_that_always_fails_is_given_up_after_its_restarts(tmp_path):
    number, _, err = launched(tmp_path, "sys.exit(7)", 1, restarts=1)
    assert number == 1 and err.count("error: process 0 of 1") == 2 and err.count("starting again") == 1


# Being asked to stop


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


def test_sigterm_while_waiting_to_start_again_ends_the_wait(tmp_path):
    with started(launcher("sys.exit(75)", 1, restarts=9), tmp_path / "launcher") as running:
        until(lambda: "starting again in 4 s" in running.said(), running)
        running.process.send_signal(signal.SIGTERM)
        asked = time.monotonic()
        assert running.wait(20) == 75
    assert time.monotonic() - asked < 2


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


def test_one_that_stays_when_the_others_have_ended_well_is_killed(tmp_path):
    code, _, err = launched(tmp_path, "time.sleep(600 if rank == 2 else 0)", 3, straggler=1.0)
    assert code == 1
    assert re.search(r"error: process 2 of 3 \(on .*\) had to be killed", err)


def test_a_failure_on_another_host_is_told_as_this_hosts_processes_tell_it(tmp_path):
    lost = "process 0 (host-a, 10.0.0.1, pid 7) was lost: it has said nothing for 60 s"
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
        rf"^error: {re.escape(lost)}; so says process 1 of 2 \(on .*\), which failed with code 1$", err, re.M
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


# What is asked for


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
        "SOME_OTHER": "kept",
    }
    assert {**real.environment(9, "node0:29500"), **expected} == real.environment(9, "node0:29500")
    fake = Job(("x",), 2, devices_per_process=3).environment(1, "127.0.0.1:5")
    assert fake["VIT_DIST_FAKE_DEVICES"] == "3" and "VIT_DIST_LOCAL_PROCESS" not in fake


@pytest.mark.parametrize("between", [["--"], []])
def test_the_verb_and_its_arguments_are_passed_on_untouched(between, monkeypatch):
    jobs = []
    monkeypatch.setattr("vit_dist.job.launcher.launch", lambda job: jobs.append(job) or 75)
    verb = ["train", "--config=a b.py", "--config.mesh.data=-1", "--config.seed", "3", "--", "--restarts=9"]
    assert cli.main(["launch", "--processes=2", "--devices-per-process", "4", "--restarts=5", *between, *verb]) == 75
    assert jobs == [Job((sys.executable, "-m", "vit_dist", *verb), 2, devices_per_process=4, restarts=5)]


@pytest.mark.parametrize(
    "words, said",
    [
        ("--processes=2", "no verb is given"),
        ("--processes=2 --", "no verb is given"),
        ("--processes=2 -- trian", "did you mean train"),
        ("--processes=2 -- launch -- train", "'launch' is none of train, eval, predict, bench"),
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
        ("--processes=2 --nodes=2 --node-rank=2 --coordinator=a:1 -- train", "numbered from 0"),
        ("--processes=2 --nodes=2 --node-rank=0 --coordinator=a -- train", "expected HOST:PORT"),
        ("--processes=2 --coordinator=a:99999 -- train", "expected HOST:PORT"),
    ],
)
def test_what_makes_no_sense_is_one_line_that_names_it(words, said, capsys, monkeypatch):
    monkeypatch.setattr("vit_dist.job.launcher.launch", lambda job: pytest.fail(f"{job} was started"))
    try:
        assert cli.main(["launch", *words.split()]) == 2
    except SystemExit as ended:  # argparse's own
        assert ended.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert said in err


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

"""A folder has one owner: by threads and processes that race for it, are killed, and hold it on other hosts."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vit_dist.config import ConfigError
from vit_dist.run import lock as lock_module
from vit_dist.run.lock import Lock, locked, refuse_second

HOLD = """
import sys, time
from pathlib import Path
from vit_dist.run.lock import Lock
Lock(Path(sys.argv[1]), 60)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def owners(folder):
    return sorted(file.name for file in folder.iterdir())


def elsewhere(folder, *, number=1, ago=0.0):
    """A lock's file as an owner on another host has left it, touched `ago` seconds ago."""
    file = folder / f".owner.{number}"
    values = {"host": "node7", "sight": "node7 boot pid", "pid": 4, "began": "1", "since": "2026-01-01", "token": "t"}
    file.write_text(json.dumps(values))
    os.utime(file, (time.time() - ago,) * 2)
    return file


@pytest.fixture
def quick(monkeypatch):
    """Seconds become tenths."""
    monkeypatch.setattr(lock_module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock_module, "SHORTEST_DEADLINE", 0.5)
    monkeypatch.setattr(lock_module, "_POLL_SECONDS", 0.02)


def test_the_second_process_is_refused_at_once_and_told_who_holds_it(tmp_path, holder):
    began = time.monotonic()
    told = rf"process {holder.pid} on {os.uname().nodename}, since 20\d\d-.*; end it first, or choose another OUT"
    with pytest.raises(ConfigError, match=told), locked(tmp_path, 60, "OUT"):
        pass
    with pytest.raises(ConfigError, match=told):
        refuse_second(tmp_path, "OUT")
    assert time.monotonic() - began < 1
    assert owners(tmp_path) == [".owner.1"]


def test_the_lock_of_a_process_that_was_killed_is_taken_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    refuse_second(tmp_path, "OUT")
    began = time.monotonic()
    with locked(tmp_path, 60, "OUT"):
        assert owners(tmp_path) == [".owner.2"]
    assert time.monotonic() - began < 1 and owners(tmp_path) == []


def test_a_process_that_has_the_number_of_the_dead_owner_is_not_taken_for_it(tmp_path):
    """As the process 1 of a container that has started again."""
    with locked(tmp_path, 60, "OUT"):
        values = json.loads((tmp_path / ".owner.1").read_text())
    (tmp_path / ".owner.1").write_text(json.dumps(values | {"began": "7"}))
    with locked(tmp_path, 60, "OUT"):
        assert owners(tmp_path) == [".owner.2"]
    (tmp_path / ".owner.1").write_text(json.dumps(values))  # this very process
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on"), locked(tmp_path, 60, "OUT"):
        pass


@pytest.mark.slow
def test_an_owner_in_another_container_is_refused_while_it_lives_and_replaced_when_it_is_dead(tmp_path):
    """Both are the process 1 of a namespace of their own, which cannot see the other's."""
    alone = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    command = [*alone, sys.executable, "-c", HOLD.replace(", 60)", ", 12)"), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "held\n" and json.loads((tmp_path / ".owner.1").read_text())["pid"] == 1
        second = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert second.returncode == 1 and "process 1 on" in second.stderr.splitlines()[-1]
        first.kill()
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as third:
        assert third.stdout.readline() == "held\n" and 5 < time.monotonic() - began < 30
        assert owners(tmp_path) == [".owner.2"]
        third.kill()


def test_an_owner_out_of_sight_is_dead_when_its_file_was_not_touched_for_the_deadline(tmp_path):
    elsewhere(tmp_path, ago=61)
    with locked(tmp_path, 60, "OUT"):
        assert owners(tmp_path) == [".owner.2"]


def test_an_owner_out_of_sight_is_awaited_until_the_deadline(tmp_path, quick):
    elsewhere(tmp_path, ago=0.2)
    began = time.monotonic()
    with locked(tmp_path, 1.2, "OUT"):
        assert 0.9 < time.monotonic() - began < 5


def test_an_owner_out_of_sight_whose_file_is_touched_lives(tmp_path, quick):
    file = elsewhere(tmp_path)
    touched = threading.Timer(0.2, lambda: os.utime(file))
    touched.start()
    told = "process 4 on node7, since 2026-01-01 writes there; end it first, or choose another OUT"
    with pytest.raises(ConfigError, match=told), locked(tmp_path, 20, "OUT"):
        pass
    touched.join()
    assert owners(tmp_path) == [".owner.1"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 3}', "[" * 2000])
def test_a_lock_that_names_nobody_is_judged_by_its_touches(tmp_path, quick, content):
    file = tmp_path / ".owner.1"
    file.write_text(content)
    touched = threading.Timer(0.1, lambda: os.utime(file))
    touched.start()
    with pytest.raises(ConfigError, match="does not name writes there"), locked(tmp_path, 20, "OUT"):
        pass
    touched.join()
    with locked(tmp_path, 0.5, "OUT"):
        assert owners(tmp_path) == [".owner.2"]


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_a_lock_that_is_no_file_is_not_waited_for(tmp_path, quick, make):
    make(tmp_path / ".owner.1")
    os.utime(tmp_path / ".owner.1", (1, 1))
    refuse_second(tmp_path, "OUT")
    if make is os.mkfifo:
        with locked(tmp_path, 0.5, "OUT"):
            assert owners(tmp_path) == [".owner.2"]
    else:
        with pytest.raises(ConfigError, match="cannot write there .Is a directory"), locked(tmp_path, 0.5, "OUT"):
            pass


def test_the_owner_touches_its_file_and_notices_when_it_is_taken_away(tmp_path, quick):
    lock = Lock(tmp_path, 60)
    os.utime(tmp_path / ".owner.1", (1, 1))
    deadline = time.monotonic() + 20
    while (tmp_path / ".owner.1").stat().st_mtime < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.check()
    (tmp_path / ".owner.1").unlink()
    taken = elsewhere(tmp_path, number=2)
    while lock._thread.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="taken away .* process 4 on node7, .* has it; this process writes there no"):
        lock.check()
    lock.release()
    assert owners(tmp_path) == [taken.name]


def test_of_many_that_race_for_a_dead_owners_lock_one_gets_it(tmp_path):
    elsewhere(tmp_path, ago=61)
    got, refused, ready = [], [], threading.Barrier(12)

    def race():
        ready.wait()
        try:
            got.append(Lock(tmp_path, 60))
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=race) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 11 and len(owners(tmp_path)) == 1
    got[0].release()
    assert owners(tmp_path) == []


def test_two_that_have_found_different_locks_both_begin_again(tmp_path, monkeypatch, quick):
    """One made its file between the other's looking and making; it is the first of them that ends up with it."""
    look, seen = lock_module._dead_owners, []

    def late(folder, deadline):
        found = look(folder, deadline)
        if not seen:
            seen.append(elsewhere(folder, number=1, ago=0))  # taken, released and taken by others meanwhile
            (folder / ".owner.5").unlink()
        return found

    elsewhere(tmp_path, number=5, ago=61)
    monkeypatch.setattr(lock_module, "_dead_owners", late)
    lock = Lock(tmp_path, 0.5)
    assert owners(tmp_path) == [".owner.2"]  # not 6: it has looked again
    lock.release()


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "failures").mkdir()
    partial = f".classes.json.{'0123456789abcdef' * 2}.tmp"
    kept = [".mine.tmp", ".classes.json.tmp", f"classes.json.{'0' * 32}.tmp", "metrics.jsonl"]
    for name in (partial, *kept):
        (tmp_path / name).write_text("")
    (tmp_path / "failures" / partial).write_text("")
    with locked(tmp_path, 60, "OUT"):
        assert owners(tmp_path) == sorted([".owner.1", "failures", *kept])
        assert list((tmp_path / "failures").iterdir()) == []


def test_a_folder_is_made_and_removed_again_if_nothing_was_written(tmp_path):
    folder = tmp_path / "new" / "run"
    with locked(folder, 60, "OUT"):
        assert owners(folder) == [".owner.1"]
    assert owners(tmp_path) == []
    with locked(folder, 60, "OUT"):
        (folder / "a").write_text("")
    assert owners(folder) == ["a"]


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
def test_a_folder_that_cannot_be_had_is_refused(tmp_path: Path, name: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write there \(.*\); choose another OUT"):
        with locked(tmp_path / name, 60, "OUT"):
            pass
    assert owners(tmp_path) == ["file"]

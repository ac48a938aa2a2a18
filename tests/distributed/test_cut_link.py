"""Two hosts train together until their link is cut: each names the process that it has lost, and a restart resumes."""

import contextlib
import json
import time

import hosts
import pytest
from system import checkpoint_steps, command, rows, started, until

PORT = 29500
PEER_SECONDS = 8
STEPS = 400


@contextlib.contextmanager
def on_both(two, folder, attempt):
    """The process of each host in one run, under way: many short steps, a checkpoint every 50."""
    overrides = (
        *("fake_devices=2", "mesh.data=-1", f"total_steps={STEPS}", "checkpoint.every_steps=50", "log_every=10"),
        *(f"deadlines.peer_seconds={PEER_SECONDS}", "deadlines.start_seconds=60"),
    )
    with contextlib.ExitStack() as opened:
        yield [
            opened.enter_context(
                started(
                    two.on(host, command(folder / "run", *overrides)),
                    folder / f"{attempt}-{host}",
                    VIT_DIST_COORDINATOR=f"{hosts.ADDRESSES['host-a']}:{PORT}",
                    VIT_DIST_PROCESSES="2",
                    VIT_DIST_PROCESS=str(index),
                )
            )
            for index, host in enumerate(hosts.ADDRESSES)
        ]


@pytest.mark.slow
def test_a_cut_link_ends_both_sides_in_time_and_the_run_resumes_when_it_is_restored(tmp_path):
    if why := hosts.why_not():
        pytest.skip(f"NOT RUN, this machine cannot be two hosts: {why}")
    with hosts.Hosts() as two:
        with on_both(two, tmp_path, "first") as (first, second):
            until(lambda: len(checkpoint_steps(tmp_path / "run")) >= 1, first)
            two.cut()
            cut_at = time.monotonic()
            codes = (first.wait(60), second.wait(60))
            took = time.monotonic() - cut_at
        print(f"both sides ended {took:.1f} s after the cut; a silence may last {PEER_SECONDS} s")
        assert codes == (1, 1), first.said()[-2000:] + second.said()[-2000:]
        assert PEER_SECONDS * 0.5 < took < PEER_SECONDS + 10
        assert "error: process 1 (host-b, 10.77.0.2, pid " in first.said()
        assert "error: process 0 (host-a, 10.77.0.1:29500, pid " in second.said()
        for side in (first, second):
            assert "was lost: it has sent nothing for" in side.said() and "Traceback" not in side.said()

        saved = checkpoint_steps(tmp_path / "run")[-1]
        two.plug()
        with on_both(two, tmp_path, "second") as (first, second):
            assert (first.wait(), second.wait()) == (0, 0), first.said()[-2000:] + second.said()[-2000:]
    assert f"resuming from step {saved}" in first.said()
    steps = [row["step"] for row in rows(tmp_path / "run")]
    assert steps == list(range(10, STEPS + 1, 10))
    sessions = json.loads((tmp_path / "run/environment.json").read_text())
    assert [session["devices"]["processes"] for session in sessions] == [2, 2]

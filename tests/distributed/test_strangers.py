"""Hundreds of hostile and idle connections to a job's port, before its processes meet and while it trains."""

import contextlib
import stat
import sys

import pytest
from strangers import idle, listening, messages, send, until_listening
from system import NOTHING_RANDOM, command, rows, started, until

from vit_dist.job.launcher import free_port
from vit_dist.job.secret import FILE


@pytest.mark.chaos
@pytest.mark.parametrize("secret", ["", "0123456789abcdef"])
@pytest.mark.skipif(sys.platform != "linux", reason="reads in /proc where the host listens")
def test_hostile_connections_before_and_during_a_job_are_lines_of_its_log_and_nothing_else(secret, tmp_path, tally):
    with tally.attempts("hostile and idle connections, before a job and while it trains", 800):
        _attacked(secret, tmp_path)


def _attacked(secret, tmp_path):
    port, run = free_port(), tmp_path / "run"
    overrides = ("fake_devices=1", "mesh.data=2", "total_steps=1000", "evaluate.every_steps=0", *NOTHING_RANDOM)
    variables = {"VIT_DIST_COORDINATOR": f"127.0.0.1:{port}", "VIT_DIST_PROCESSES": "2", "VIT_DIST_JOB_SECRET": secret}
    words, strangers = command(run, *overrides), []

    def attack():
        strangers.extend(idle(port, 100))
        for message in messages(200):
            assert send(port, message)
        strangers.extend(idle(port, 100))
        assert all(host.endswith("0100007F") for host in listening(port)) and listening(port)  # 127.0.0.1

    with contextlib.ExitStack() as opened:
        first = opened.enter_context(started(words, tmp_path / "0", VIT_DIST_PROCESS="0", **variables))
        until_listening(port)
        attack()
        running = opened.enter_context(started(words, tmp_path / "1", VIT_DIST_PROCESS="1", **variables))
        until(lambda: len(rows(run)) > 1, first)
        attack()
        assert len(rows(run)) < 1000  # it trained meanwhile
        codes = (first.wait(), running.wait())
    for stranger in strangers:
        stranger.close()
    said = first.said()
    assert codes == (0, 0), said[-3000:] + running.said()[-3000:]
    assert "Traceback" not in said + running.said() and "error: " not in said + running.said()
    assert len(rows(run)) == 1000
    assert 5 < said.count("dropped a connection from 127.0.0.1: ") <= 10
    assert (run / FILE).exists() == (not secret)
    assert secret or stat.S_IMODE((run / FILE).stat().st_mode) == 0o600

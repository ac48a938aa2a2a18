"""How processes connect: those that are late, that connect by mistake, and that close the connection."""

import concurrent.futures
import json
import os
import re
import socket
import struct
import time

import pytest
from strangers import HOSTILE, Recorder, idle, messages, send

from vit_dist.config import ConfigError
from vit_dist.job import handshake
from vit_dist.job.launcher import free_port
from vit_dist.job.rank import Rank
from vit_dist.job.rendezvous import JobError, rendezvous

SECRET = b"0123456789abcdef"


@pytest.fixture
def port():
    return free_port()


def rank(port, index, count=3):
    return Rank(f"127.0.0.1:{port}", count, index)


def all_of(port, count=3, seconds=20, before=lambda: None):
    """Connects the processes of a job in threads; returns the peers of each. `before` runs once process 0 listens."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        first = pool.submit(rendezvous, rank(port, 0, count), seconds, SECRET)
        before()
        others = [pool.submit(rendezvous, rank(port, index, count), seconds, SECRET) for index in range(1, count)]
        return [future.result(seconds + 15) for future in (first, *others)]


def close(*jobs):
    for peers in jobs:
        for peer in peers.values():
            peer.connection.close()


def connect(port):
    """Returns a connection to process 0, once it listens."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=5)
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_process_0_is_connected_to_all_others_and_they_to_it(port):
    jobs = all_of(port)
    assert [sorted(peers) for peers in jobs] == [[1, 2], [0], [0]]
    assert f"pid {os.getpid()}" in str(jobs[0][1]) and f"127.0.0.1:{port}" in str(jobs[2][0])
    close(*jobs)


def test_a_job_meets_among_hostile_and_silent_connections_which_are_logged_and_dropped(port, caplog):
    strangers = []

    def connect_strangers():
        connect(port).close()
        strangers.extend(idle(port, 100))
        for message in messages(100):
            send(port, message)
        strangers.extend(idle(port, 100))

    started = time.monotonic()
    jobs = all_of(port, before=connect_strangers)
    assert [sorted(peers) for peers in jobs] == [[1, 2], [0], [0]]
    assert time.monotonic() - started < 15
    close(*jobs)
    for stranger in strangers:
        stranger.close()
    lines = [record.getMessage() for record in caplog.records]
    assert 5 < len(lines) <= 12 and all(line.isprintable() for line in lines)
    assert lines[0] == "dropped a connection from 127.0.0.1: closed without a handshake"
    dropped = int(re.fullmatch(r"dropped (\d+) connections in all that were not of this job", lines[-1])[1])
    assert dropped > 100


@pytest.mark.parametrize("message", HOSTILE.values(), ids=HOSTILE)
def test_each_hostile_message_alone_is_dropped(message, port):
    strangers = []

    def connect_stranger():
        strangers.append(connect(port))
        strangers[0].sendall(message)

    jobs = all_of(port, 2, before=connect_stranger)
    assert [sorted(peers) for peers in jobs] == [[1], [0]] and "pid 1)" not in str(jobs[0][1])
    close(*jobs)
    strangers[0].close()


def test_a_silent_connection_is_dropped_in_time(port, monkeypatch, caplog):
    monkeypatch.setattr("vit_dist.job.newcomers.HANDSHAKE_SECONDS", 0.3)
    silent = []
    jobs = all_of(port, before=lambda: silent.append(connect(port)) or time.sleep(1.5))
    silent[0].settimeout(1)
    assert silent[0].recv(4096).startswith(b'{"challenge": "') and silent[0].recv(1) == b""
    assert "no handshake within 0.3 s" in caplog.text
    close(*jobs)


def test_a_recorded_handshake_and_one_with_another_secret_are_not_believed(port, caplog):
    recorder = Recorder()

    def replay():
        recording = pool.submit(recorder.record, port)
        victim = Rank(f"127.0.0.1:{recorder.port}", 2, 1)
        with pytest.raises(JobError, match="process 0 did not answer"):
            rendezvous(victim, 1, SECRET)  # its handshake is whole, but comes back to nobody
        recording.result(10)
        assert b"2 processes" in recorder.sent
        send(port, recorder.sent)
        with pytest.raises(JobError, match="has another workdir or VIT_DIST_JOB_SECRET"):
            rendezvous(rank(port, 1, 2), 1, b"another secret...")
        assert "no handshake of this job, or another secret" in caplog.text

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        connect_ = lambda: (connect(port).close(), replay())  # noqa: E731
        jobs = all_of(port, 2, before=connect_)
    assert [sorted(peers) for peers in jobs] == [[1], [0]]
    close(*jobs)


def test_an_imposter_at_the_port_of_process_0_is_not_believed(port):
    """It answers as process 0 does, without the secret: that all have connected, or that all is lost."""
    server = socket.create_server(("127.0.0.1", port))
    server.settimeout(10)

    def answer():
        for message in ({"host": "h", "pid": 1}, {"failed": "all is lost", "blamed": 1}, {"refused": "go away"}):
            connection, _ = server.accept()
            with connection:
                connection.sendall(handshake.challenged("0"))
                connection.recv(4096)
                connection.sendall(handshake.signed(b"", "0 0", message))
        server.close()
        return rendezvous(rank(port, 0, 2), 20, SECRET)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(answer), pool.submit(rendezvous, rank(port, 1, 2), 20, SECRET)
        jobs = first.result(40), second.result(40)
    assert [sorted(peers) for peers in jobs] == [[1], [0]]
    close(*jobs)


def test_a_process_whose_connection_is_closed_connects_again(port):
    """Such as by an earlier process 0, or by another service, at the same port."""
    server = socket.create_server(("127.0.0.1", port))

    def close_first():
        connection, _ = server.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # by a reset
        connection.close()
        server.close()
        return rendezvous(rank(port, 0, 2), 20, SECRET)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(close_first), pool.submit(rendezvous, rank(port, 1, 2), 20, SECRET)
        jobs = first.result(40), second.result(40)
    assert [sorted(peers) for peers in jobs] == [[1], [0]]
    close(*jobs)


def test_a_restarted_process_replaces_the_one_that_ended(port):
    def connect_and_end():
        connection = connect(port)
        challenge = json.loads(connection.recv(4096))["challenge"]
        message = {"job": "3 processes", "index": 1, "host": "gone\x1b[2J", "pid": 1, "challenge": "0"}
        connection.sendall(handshake.signed(SECRET, challenge, message))
        time.sleep(0.2)
        connection.close()
        time.sleep(0.2)

    jobs = all_of(port, before=connect_and_end)
    assert "gone" not in str(jobs[0][1])
    close(*jobs)


def test_a_process_of_a_job_of_another_size_is_refused_and_the_others_go_on(port):
    def stray():
        with pytest.raises(
            ConfigError, match="process 1 of 2 processes connected to process 0 at .*, but this is a job of 3"
        ):
            rendezvous(rank(port, 1, 2), 10, SECRET)

    jobs = all_of(port, before=stray)
    assert [len(peers) for peers in jobs] == [2, 1, 1]
    close(*jobs)


def test_a_port_in_use_is_an_error_that_names_it(port):
    with socket.create_server(("", port)), pytest.raises(ConfigError, match=f"process 0 cannot listen at port {port}"):
        rendezvous(rank(port, 0), 1, SECRET)


def test_all_connected_processes_report_the_missing_ones(port):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(rendezvous, rank(port, index, 12), 1, SECRET) for index in (0, 2))
        for future in (first, second):
            with pytest.raises(JobError, match="processes 1, 3, 4, 5, 6, 7, 8, 9 and 2 more of 12 did not connect"):
                future.result(20)

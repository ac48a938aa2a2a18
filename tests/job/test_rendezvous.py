"""How processes connect: those that are late, that connect by mistake, and that close the connection."""

import concurrent.futures
import os
import socket
import struct
import time

import pytest

from vit_dist.config import ConfigError
from vit_dist.job.launcher import free_port
from vit_dist.job.rank import Rank
from vit_dist.job.rendezvous import JobError, encode, rendezvous


@pytest.fixture
def port():
    return free_port()


def rank(port, index, count=3):
    return Rank(f"127.0.0.1:{port}", count, index)


def all_of(port, count=3, seconds=20, before=lambda: None):
    """Connects the processes of a job in threads; returns the peers of each. `before` runs once process 0 listens."""
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        first = pool.submit(rendezvous, rank(port, 0, count), seconds)
        before()
        others = [pool.submit(rendezvous, rank(port, index, count), seconds) for index in range(1, count)]
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


def test_connections_by_mistake_do_not_block_the_job(port, monkeypatch):
    monkeypatch.setattr("vit_dist.job.rendezvous._HANDSHAKE_SECONDS", 1)
    strangers = []

    def connect_strangers():
        for message in (b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b""):
            strangers.append(connect(port))
            strangers[-1].sendall(message)

    started = time.monotonic()
    jobs = all_of(port, before=connect_strangers)
    assert [len(peers) for peers in jobs] == [2, 1, 1]
    assert time.monotonic() - started < 15  # the silent stranger has blocked process 0 for one second
    close(*jobs)
    for stranger in strangers:
        stranger.close()


def test_a_process_whose_connection_is_closed_connects_again(port):
    """Such as by an earlier process 0, or by another service, at the same port."""
    server = socket.create_server(("127.0.0.1", port))

    def close_first():
        connection, _ = server.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # by a reset
        connection.close()
        server.close()
        return rendezvous(rank(port, 0, 2), 20)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(close_first), pool.submit(rendezvous, rank(port, 1, 2), 20)
        jobs = first.result(40), second.result(40)
    assert [sorted(peers) for peers in jobs] == [[1], [0]]
    close(*jobs)


def test_a_restarted_process_replaces_the_one_that_ended(port):
    def connect_and_end():
        connection = connect(port)
        connection.sendall(encode(job="3 processes", index=1, host="gone", pid=1))
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
            rendezvous(rank(port, 1, 2), 10)

    jobs = all_of(port, before=stray)
    assert [len(peers) for peers in jobs] == [2, 1, 1]
    close(*jobs)


def test_a_port_in_use_is_an_error_that_names_it(port):
    with socket.create_server(("", port)), pytest.raises(ConfigError, match=f"process 0 cannot listen at port {port}"):
        rendezvous(rank(port, 0), 1)


def test_all_connected_processes_report_the_missing_ones(port):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(rendezvous, rank(port, index, 12), 1) for index in (0, 2))
        for future in (first, second):
            with pytest.raises(JobError, match="processes 1, 3, 4, 5, 6, 7, 8, 9 and 2 more of 12 did not connect"):
                future.result(20)

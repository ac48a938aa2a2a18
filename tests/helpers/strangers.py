"""Connections to a job's port that are not of the job, and which it must not mind."""

import contextlib
import json
import random
import socket
import time

HOSTILE = {
    "another job": b'{"job": "2 processes"}\n',
    "deep brackets": b"[" * 60_000 + b"\n",
    "brackets below the limit": b"[" * 4_000 + b"\n",
    "index x": b'{"job": "2 processes", "index": "x", "host": "h", "pid": 1}\n',
    "index null": b'{"job": "2 processes", "index": null, "host": "h", "pid": 1}\n',
    "index 7": b'{"job": "2 processes", "index": 7, "host": "h", "pid": 1}\n',
    "index -1": b'{"job": "2 processes", "index": -1, "host": "h", "pid": 1}\n',
    "index 1": b'{"job": "2 processes", "index": 1, "host": "h", "pid": 1, "challenge": "0"}\n',
    "a code of nothing": json.dumps({"text": '{"job": "2 processes", "index": 1}', "code": "0" * 64}).encode() + b"\n",
    "a code that is no text": b'{"text": "{}", "code": [1]}\n',
    "a code of lone surrogates": b'{"text": "\\ud800", "code": "\\ud800"}\n',
    "escape codes": b'\x1b[2Jerror: \x1b]0;x\x07 {"host": "\\u001b[31m"}\n',
    "half a line": b'{"text": "{',
    "a web browser": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "nothing": b"",
}


def messages(count, replayed=b""):
    """Returns `count` hostile messages: each of `HOSTILE` in turn, a recorded handshake, and binary noise."""
    draw = random.Random(0)
    kinds = [*HOSTILE.values(), replayed, None]
    chosen = [kinds[number % len(kinds)] for number in range(count)]
    return [draw.randbytes(draw.randrange(1, 3000)) if message is None else message for message in chosen]


def send(port, message):
    """Sends a message over a connection of its own and closes that; returns whether anybody listened."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            with contextlib.suppress(OSError):  # it may be dropped in the middle
                connection.sendall(message)
            time.sleep(0.002)
        return True
    except OSError:
        return False


def idle(port, count):
    """Returns `count` open connections that send nothing."""
    return [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(count)]


def until_listening(port, seconds=60):
    """Waits until somebody listens at the port."""
    deadline = time.monotonic() + seconds
    while not send(port, b""):
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Recorder:
    """A listener that passes one connection on to a port and records what is sent to it."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.sent = b""

    def record(self, port):
        """Passes the first connection on until either side ends it or has sent a line each way."""
        with self.listener.accept()[0] as theirs, socket.create_connection(("127.0.0.1", port), timeout=20) as ours:
            theirs.sendall(ours.recv(65536))
            self.sent = theirs.recv(65536)
        self.listener.close()


def listening(port):
    """Returns the addresses at which this host listens at the port, as /proc writes them."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{name}").read().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            host, _, number = address.partition(":")
            if state == "0A" and int(number, 16) == port:
                found.add(host)
    return found

"""The line between the processes of a job, apart from jax's own: who has come, who still lives, and who failed why.

Every process calls process 0 at the coordinator's address and says who it is (`roll_call`). When all have come, the
port is free for jax and the connections stay: the kernel closes that of a process that dies, at once; that of a
machine that is cut off falls silent; and a process that fails tells the others why. Whichever it is, each that is
left says which process was lost and ends, for jax would wait in a collective for minutes or for ever.
"""

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.exit_codes import FAILED, MISTAKE
from vit_dist.mesh.place import Place

_RETRY_SECONDS = 0.2
_MOST_NAMED = 8


class JobError(Exception):
    """The processes of a job cannot go on together; the message names those at fault."""


@dataclasses.dataclass
class Peer:
    """Another process of the job, at the end of a line. `heard` is when, on the monotonic clock, it last spoke."""

    index: int
    where: str  # its host, address and process number, as a person would look for it
    line: socket.socket
    heard: float = dataclasses.field(default_factory=time.monotonic)
    step: int = 0  # the last that it has begun
    stepped: float | None = None  # when; None: it is not at a step
    left: bool = False  # it has said goodbye
    _unread: bytes = b""
    _saying: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __str__(self) -> str:
        return f"process {self.index} ({self.where})"

    def send(self, **message: Any) -> None:
        """Says something short, without waiting; what a line that is broken or busy does not take, is not said."""
        if not self._saying.acquire(timeout=0.1):
            return
        try:
            self.line.send(_line(message), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:  # whoever listens at the other end will be missed soon, by silence or by the end of the line
            return
        finally:
            self._saying.release()

    def send_all(self, **message: Any) -> None:
        """Says something of any length, and waits until the line has taken it; if it breaks, not all is said."""
        with self._saying, contextlib.suppress(OSError):
            self.line.sendall(_line(message))

    def gone(self) -> bool:
        """Whether it has hung up, and has said nothing before."""
        try:
            return self.line.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def receive(self) -> list[dict[str, Any]] | None:
        """What it has said since; None where the line has ended."""
        try:
            data = self.line.recv(65536)
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._unread = (self._unread + data).split(b"\n")
        return [json.loads(line) for line in lines]


def roll_call(place: Place, start_seconds: int) -> dict[int, Peer]:
    """Waits until all processes have come; returns process 0's peers, all others, or anyone else's, process 0 alone.

    Raises `JobError` where one has not come after `start_seconds`, and `ConfigError` where they do not fit together.
    """
    deadline = time.monotonic() + start_seconds
    return _call_all(place, deadline, start_seconds) if place.index == 0 else _answer(place, deadline, start_seconds)


def _call_all(place: Place, deadline: float, seconds: int) -> dict[int, Peer]:
    """Process 0's part: listens until each of the others has called."""
    found: dict[int, Peer] = {}
    with _listen(place) as door:
        while len(found) < place.count - 1:
            door.settimeout(max(0.0, deadline - time.monotonic()) or 0.001)
            try:
                line, address = door.accept()
            except TimeoutError:
                missing = [index for index in range(1, place.count) if index not in found]
                raise _told(found, JobError(_say_missing(missing, place, seconds))) from None
            line.settimeout(5)
            hello = _read_line(line)
            if hello is None or hello.get("job") != _job(place):  # a port scanner, or a process of another job
                if hello is not None and "index" in hello:
                    line.sendall(_line({"wrong": f"this is a job of {_job(place)}"}))
                line.close()
                continue
            index = int(hello["index"])
            line.settimeout(None)
            where = address[0].removeprefix("::ffff:")  # an IPv4 address as IPv6 writes it
            peer = Peer(index, f"{hello['host']}, {where}, pid {hello['pid']}", line)
            if (index in found and not found[index].gone()) or not 0 < index < place.count:
                error = f"process {index} has come twice, from {found.get(index, 'process 0')} and from {peer}; "
                raise _told({**found, -1: peer}, ConfigError(f"{error}give each its own number"))
            found[index] = peer
    for peer in found.values():
        peer.line.sendall(_line({"host": socket.gethostname(), "pid": os.getpid()}))
    return found


def _answer(place: Place, deadline: float, seconds: int) -> dict[int, Peer]:
    """The part of every other process: calls process 0 until it answers, and waits for its word that all have come."""
    problem = "nothing answers"
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = socket.create_connection(place.address, timeout=left)
        except OSError as error:  # it may not have started yet, or its name not be known yet
            problem = error.strerror or str(error)
            time.sleep(_RETRY_SECONDS)
            continue
        hello = {"job": _job(place), "index": place.index, "host": socket.gethostname(), "pid": os.getpid()}
        line.sendall(_line(hello))
        line.settimeout(max(1.0, deadline - time.monotonic()) + 10)  # process 0 says who is missing; hear it out
        answer = _read_line(line)
        if answer is None:  # it, or what listened at its port before it, is gone again
            line.close()
            time.sleep(_RETRY_SECONDS)
            continue
        if "wrong" in answer:
            raise ConfigError(f"process {place.index} of {_job(place)} met process 0 at {place.coordinator}, but "
                              f"{answer['wrong']}; start them all alike")  # fmt: skip
        if "failed" in answer:
            raise (ConfigError if answer["code"] == MISTAKE else JobError)(answer["failed"])
        line.settimeout(None)
        return {0: Peer(0, f"{answer['host']}, {place.coordinator}, pid {answer['pid']}", line)}
    raise JobError(
        f"process 0 was not there at {place.coordinator} for {seconds} s ({problem}); see whether it runs, and whether "
        "this host can reach that address (deadlines.start_seconds)"
    )


def _listen(place: Place) -> socket.socket:
    host, port = place.address
    try:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        return socket.create_server(
            ("", port), family=family, backlog=place.count, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        raise ConfigError(
            f"{place.coordinator}: process 0 cannot listen at port {port} ({error.strerror}); choose another"
        ) from error


def _read_line(line: socket.socket) -> dict[str, Any] | None:
    """The next message, read byte by byte so that none after it is lost; None where there is none to be had."""
    text = b""
    while not text.endswith(b"\n") and len(text) < 65536:
        try:
            byte = line.recv(1)
        except OSError:
            return None
        if not byte:
            return None
        text += byte
    try:
        message = json.loads(text)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _job(place: Place) -> str:
    return f"{place.count} processes"


def _told(found: dict[int, Peer], error: Exception) -> Exception:
    """The error, once those who have come know of it."""
    for peer in found.values():
        peer.send(failed=str(error), code=MISTAKE if isinstance(error, ConfigError) else FAILED)
    return error


def _say_missing(missing: list[int], place: Place, seconds: int) -> str:
    named = ", ".join(map(str, missing[:_MOST_NAMED]))
    more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
    one = len(missing) == 1
    return (
        f"process{'' if one else 'es'} {named}{more} of {place.count} did not come to {place.coordinator} within "
        f"{seconds} s; see whether {'it runs' if one else 'they run'} and can reach that address "
        "(deadlines.start_seconds)"
    )

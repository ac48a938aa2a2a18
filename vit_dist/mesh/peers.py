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
import resource
import socket
import threading
import time
from typing import Any

from vit_dist.config import ConfigError
from vit_dist.mesh.place import Place

_RETRY_SECONDS = 0.2
_CONNECT_SECONDS = 5  # of one attempt: the name may come to mean another machine meanwhile
_HELLO_SECONDS = 5  # for whoever calls to say who it is
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
            line = as_line(**message)
            if self.line.send(line, socket.MSG_DONTWAIT) < len(line):
                self.line.shutdown(socket.SHUT_RDWR)  # half a message would make nonsense of the next
        except OSError:  # whoever listens at the other end will be missed soon, by silence or by the end of the line
            return
        finally:
            self._saying.release()

    def send_all(self, line: bytes) -> None:
        """Says something of any length, and waits until the line has taken it; one that breaks has not heard it."""
        said = False
        with self._saying, contextlib.suppress(OSError):
            try:
                self.line.sendall(line)
                said = True
            finally:
                if not said:  # a Ctrl-C in the middle of it, perhaps
                    self.line.shutdown(socket.SHUT_RDWR)

    def gone(self) -> bool:
        """Whether it has hung up, and has said nothing before."""
        try:
            return self.line.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def receive(self) -> list[dict[str, Any]] | None:
        """What it has said since, without waiting; None where the line has ended, or carries nonsense."""
        try:
            data = self.line.recv(65536, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._unread = (self._unread + data).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            return None


def roll_call(place: Place, start_seconds: int) -> dict[int, Peer]:
    """Waits until all processes have come; returns process 0's peers, all others, or anyone else's, process 0 alone.

    Raises `JobError` where one has not come after `start_seconds`, or two say that they are the same, and `ConfigError`
    on a process of a job of another size.
    """
    deadline = time.monotonic() + start_seconds
    return _call_all(place, deadline, start_seconds) if place.index == 0 else _answer(place, deadline, start_seconds)


def _call_all(place: Place, deadline: float, seconds: int) -> dict[int, Peer]:
    """Process 0's part: listens until each of the others has called; one that hangs up meanwhile has not."""
    _allow_files(place.count)
    found: dict[int, Peer] = {}
    with _listen(place) as door:
        while len(found := {index: peer for index, peer in found.items() if not peer.gone()}) < place.count - 1:
            line, address = _next_caller(door, deadline)
            if line is None:
                missing = [index for index in range(1, place.count) if index not in found]
                raise _told(found, JobError(_say_missing(missing, place, seconds)))
            hello = _read_line(line, time.monotonic() + _HELLO_SECONDS)
            if hello is None or hello.get("job") != _job(place):  # a port scanner, or a process of another job
                if hello is not None and "index" in hello:
                    Peer(-1, "", line).send(wrong=f"this is a job of {_job(place)}")
                line.close()
                continue
            line.settimeout(None)
            peer = Peer(int(hello["index"]), f"{hello['host']}, {address}, pid {hello['pid']}", line)
            before = found.get(peer.index)
            if (before is not None and not before.gone()) or not 0 < peer.index < place.count:
                error = f"process {peer.index} has come twice, from {before or 'process 0'} and from {peer}; "
                raise _told({**found, -1: peer}, JobError(f"{error}give each its own number"))
            found[peer.index] = peer
    here = as_line(host=socket.gethostname(), pid=os.getpid())
    for peer in found.values():
        peer.send_all(here)
    return found


def _next_caller(door: socket.socket, deadline: float) -> tuple[socket.socket | None, str]:
    """The line of whoever calls next, and its address; no line where nobody has before the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        return None, ""
    door.settimeout(left)
    try:
        line, address = door.accept()
    except TimeoutError:
        return None, ""
    except OSError as error:
        raise JobError(f"process 0 cannot hold a connection to each of the others ({error.strerror})") from error
    return line, address[0].removeprefix("::ffff:")  # an IPv4 address as IPv6 writes it


def _allow_files(count: int) -> None:
    """Lets this process hold a connection to each of the others: the usual limit is 1,024 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _answer(place: Place, deadline: float, seconds: int) -> dict[int, Peer]:
    """The part of every other process: calls process 0 until it answers, and waits for its word that all have come."""
    problem = "nothing answers"
    hello = as_line(job=_job(place), index=place.index, host=socket.gethostname(), pid=os.getpid())
    while (left := deadline - time.monotonic()) > 0:
        try:
            line = socket.create_connection(place.address, timeout=min(left, _CONNECT_SECONDS))
            line.sendall(hello)
        except OSError as error:  # it may not have started yet, or its name not be known yet
            problem = error.strerror or str(error)
            time.sleep(_RETRY_SECONDS)
            continue
        answer = _read_line(line, deadline + 10)  # process 0 says who is missing; hear it out
        if answer is None:  # it, or what listened at its port before it, is gone again
            line.close()
            time.sleep(_RETRY_SECONDS)
            continue
        if "wrong" in answer:
            raise ConfigError(
                f"process {place.index} of {_job(place)} met process 0 at {place.coordinator}, but {answer['wrong']}; "
                "start them all alike"
            )
        if "failed" in answer:
            raise JobError(answer["failed"])
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


def _read_line(line: socket.socket, deadline: float) -> dict[str, Any] | None:
    """The next message, read byte by byte so that none after it is lost; None where there is none to be had in time."""
    text = b""
    while not text.endswith(b"\n") and len(text) < 65536:
        line.settimeout(max(0.01, deadline - time.monotonic()))
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


def as_line(**message: Any) -> bytes:
    """A message as it goes over a line."""
    return json.dumps(message).encode() + b"\n"


def _job(place: Place) -> str:
    return f"{place.count} processes"


def _told(found: dict[int, Peer], error: Exception) -> Exception:
    """The error, once those who have come know of it."""
    for peer in found.values():
        peer.send(failed=str(error))
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

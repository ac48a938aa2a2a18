"""How the processes of a job meet, and the connections that they keep, apart from jax's own.

Every process connects to process 0 at the coordinator's address and says which one it is (`rendezvous`). When all have
come, the port is free for jax and the connections stay: the kernel closes that of a process that dies, at once; that of
a machine that is cut off falls silent; and a process that fails tells the others why. Whichever it is, `watchdog` says
on each process that is left which one was lost and ends it, for jax would wait in a collective for minutes or for ever.
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
from vit_dist.job.rank import Rank

_RETRY_SECONDS = 0.2
_CONNECT_SECONDS = 5  # of one attempt: the name may come to mean another machine meanwhile
_GREETING_SECONDS = 5  # for whoever connects to say which process it is
_MOST_NAMED = 8


class JobError(Exception):
    """The processes of a job cannot go on together; the message names those at fault, `blamed` the first of them."""

    def __init__(self, message: str, blamed: int | None = None) -> None:
        super().__init__(message)
        self.blamed = blamed


@dataclasses.dataclass
class Peer:
    """Another process of the job, and the connection to it."""

    index: int
    where: str  # its host, address and process number, as a person would look for it
    connection: socket.socket
    heard: float = dataclasses.field(default_factory=time.monotonic)  # when it last sent something
    step: int = 0  # the last that it has begun
    stepped: float | None = None  # when, on the monotonic clock; None: it is not at a step
    left: bool = False  # it has said goodbye, or its connection has ended
    _unread: bytes = b""
    _sending: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __str__(self) -> str:
        return f"process {self.index} ({self.where})"

    def send(self, **message: Any) -> None:
        """Sends a short message without waiting. What a broken or busy connection does not take is lost."""
        if not self._sending.acquire(timeout=0.1):
            return
        try:
            line = encode(**message)
            if self.connection.send(line, socket.MSG_DONTWAIT) < len(line):
                self.connection.shutdown(socket.SHUT_RDWR)  # half a message would make nonsense of the next
        except OSError:  # the peer will be missed soon, by its silence or by the end of the connection
            return
        finally:
            self._sending.release()

    def send_all(self, line: bytes) -> None:
        """Sends a message of any length, and waits until the connection has taken it, or has broken."""
        sent = False
        with self._sending, contextlib.suppress(OSError):
            try:
                self.connection.sendall(line)
                sent = True
            finally:
                if not sent:  # a Ctrl-C in the middle of it, perhaps
                    self.connection.shutdown(socket.SHUT_RDWR)

    def gone(self) -> bool:
        """Whether it has closed the connection, and sent nothing before."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def receive(self) -> list[dict[str, Any]] | None:
        """The messages that have come since, without waiting; None where the connection has ended or is misused."""
        try:
            data = self.connection.recv(65536, socket.MSG_DONTWAIT)
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


def rendezvous(rank: Rank, start_seconds: int) -> dict[int, Peer]:
    """Waits until all processes have come; returns the peers by index.

    The peers of process 0 are all others, and those of any other are process 0 alone. Raises `JobError` where one has
    not come after `start_seconds`, or two say that they are the same, and `ConfigError` on a process of a job of
    another size.
    """
    deadline = time.monotonic() + start_seconds
    return _accept_all(rank, deadline, start_seconds) if rank.index == 0 else _connect(rank, deadline, start_seconds)


def _accept_all(rank: Rank, deadline: float, seconds: int) -> dict[int, Peer]:
    """Process 0's part: accepts connections until each of the others has one; who closes it meanwhile has not come."""
    _allow_files(rank.count)
    peers: dict[int, Peer] = {}
    with _listen(rank) as server:
        while len(peers := {index: peer for index, peer in peers.items() if not peer.gone()}) < rank.count - 1:
            connection, address = _accept(server, deadline)
            if connection is None:
                missing = [index for index in range(1, rank.count) if index not in peers]
                raise _tell(peers, JobError(_describe_missing(missing, rank, seconds), missing[0]))
            greeting = _read_message(connection, time.monotonic() + _GREETING_SECONDS)
            if greeting is None or greeting.get("job") != _job(rank):  # a port scanner, or a process of another job
                if greeting is not None and "index" in greeting:
                    Peer(-1, "", connection).send(wrong=f"this is a job of {_job(rank)}")
                connection.close()
                continue
            connection.settimeout(None)
            peer = Peer(int(greeting["index"]), f"{greeting['host']}, {address}, pid {greeting['pid']}", connection)
            before = peers.get(peer.index)
            if (before is not None and not before.gone()) or not 0 < peer.index < rank.count:
                error = f"process {peer.index} has come twice, from {before or 'process 0'} and from {peer}; "
                raise _tell({**peers, -1: peer}, JobError(f"{error}give each its own number"))
            peers[peer.index] = peer
    answer = encode(host=socket.gethostname(), pid=os.getpid())
    for peer in peers.values():
        peer.send_all(answer)
    return peers


def _accept(server: socket.socket, deadline: float) -> tuple[socket.socket | None, str]:
    """The next connection and the address it comes from; no connection where there is none before the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        return None, ""
    server.settimeout(left)
    try:
        connection, address = server.accept()
    except TimeoutError:
        return None, ""
    except OSError as error:
        raise JobError(f"process 0 cannot hold a connection to each of the others ({error.strerror})") from error
    return connection, address[0].removeprefix("::ffff:")  # an IPv4 address as IPv6 writes it


def _allow_files(count: int) -> None:
    """Lets this process hold a connection to each of the others: the usual limit is 1,024 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _connect(rank: Rank, deadline: float, seconds: int) -> dict[int, Peer]:
    """The part of every other process: connects to process 0, and waits for its word that all have come."""
    problem = "nothing answers"
    greeting = encode(job=_job(rank), index=rank.index, host=socket.gethostname(), pid=os.getpid())
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(rank.address, timeout=min(left, _CONNECT_SECONDS))
            connection.sendall(greeting)
        except OSError as error:  # it may not have started yet, or its name not be known yet
            problem = error.strerror or str(error)
            time.sleep(_RETRY_SECONDS)
            continue
        answer = _read_message(connection, deadline + 10)  # process 0 says who is missing; hear it out
        if answer is None:  # it, or what listened at its port before it, is gone again
            connection.close()
            time.sleep(_RETRY_SECONDS)
            continue
        if "wrong" in answer:
            raise ConfigError(
                f"process {rank.index} of {_job(rank)} met process 0 at {rank.coordinator}, but {answer['wrong']}; "
                "start them all alike"
            )
        if "failed" in answer:
            raise JobError(answer["failed"], answer["blamed"])
        connection.settimeout(None)
        return {0: Peer(0, f"{answer['host']}, {rank.coordinator}, pid {answer['pid']}", connection)}
    raise JobError(
        f"process 0 was not there at {rank.coordinator} for {seconds} s ({problem}); see whether it runs, and whether "
        "this host can reach that address (deadlines.start_seconds)",
        blamed=0,
    )


def _listen(rank: Rank) -> socket.socket:
    host, port = rank.address
    try:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        return socket.create_server(
            ("", port), family=family, backlog=rank.count, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        raise ConfigError(
            f"{rank.coordinator}: process 0 cannot listen at port {port} ({error.strerror}); choose another"
        ) from error


def _read_message(connection: socket.socket, deadline: float) -> dict[str, Any] | None:
    """The next message, read byte by byte so that none after it is lost; None where none comes in time."""
    text = b""
    while not text.endswith(b"\n") and len(text) < 65536:
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        try:
            byte = connection.recv(1)
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


def encode(**message: Any) -> bytes:
    """A message as it is sent: a line of JSON."""
    return json.dumps(message).encode() + b"\n"


def _job(rank: Rank) -> str:
    return f"{rank.count} processes"


def _tell(peers: dict[int, Peer], error: JobError) -> JobError:
    """The error, once those who have come know of it."""
    for peer in peers.values():
        peer.send(failed=str(error), blamed=error.blamed)
    return error


def _describe_missing(missing: list[int], rank: Rank, seconds: int) -> str:
    named = ", ".join(map(str, missing[:_MOST_NAMED]))
    more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
    one = len(missing) == 1
    return (
        f"process{'' if one else 'es'} {named}{more} of {rank.count} did not come to {rank.coordinator} within "
        f"{seconds} s; see whether {'it runs' if one else 'they run'} and can reach that address "
        "(deadlines.start_seconds)"
    )

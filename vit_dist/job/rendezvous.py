"""How the processes of a job connect to each other, and the connections that they keep, apart from jax's own.

Every process connects to process 0 at the coordinator's address, proves that it is of the job (`handshake`) and sends
its number (`rendezvous`). When all have connected, the port is free for jax and the connections stay open. The kernel
closes the connection of a process that dies, at once. The connection to a machine that is cut off falls silent. A
process that fails sends the others the reason. In each case `watchdog` reports on the remaining processes which one was
lost, and ends them: jax would wait in a collective for minutes or forever.
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
from vit_dist.escape import printable
from vit_dist.job import handshake
from vit_dist.job.listening import bind_host, listen
from vit_dist.job.newcomers import MOST_UNPROVED, Newcomer, Newcomers
from vit_dist.job.rank import Rank
from vit_dist.job.secret import VARIABLE

_RETRY_SECONDS = 0.2
_CONNECT_SECONDS = 5  # for one attempt: the name may resolve to another machine in the meantime
_LOOK_SECONDS = 1.0  # between two looks whether a peer has gone
_MOST_NAMED = 8
_LONGEST_NAME = 200  # characters of what a peer calls its host


class JobError(Exception):
    """The processes of a job cannot go on together. The message names those at fault; `blamed` is the first of them."""

    def __init__(self, message: str, blamed: int | None = None) -> None:
        super().__init__(message)
        self.blamed = blamed


@dataclasses.dataclass
class Peer:
    """Another process of the job, and the connection to it. Times are those of the monotonic clock."""

    index: int
    where: str  # its host, address and process id, for people
    connection: socket.socket
    last_heard: float = dataclasses.field(default_factory=time.monotonic)
    step: int = 0  # the last step that it has begun
    step_began: float | None = None  # None: it is not at a step
    left: bool = False  # it has left the job, or its connection has closed
    _unread: bytes = b""
    _sending: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def __str__(self) -> str:
        return f"process {self.index} ({self.where})"

    def send(self, **message: Any) -> None:
        """Sends a short message without blocking. Drops it if the connection is broken or its buffer is full."""
        if not self._sending.acquire(timeout=0.1):
            return
        try:
            data = encode(**message)
            if self.connection.send(data, socket.MSG_DONTWAIT) < len(data):
                self.connection.shutdown(socket.SHUT_RDWR)  # after half a message the next could not be read
        except OSError:  # the watchdog will notice by the silence or the end of the connection
            return
        finally:
            self._sending.release()

    def send_all(self, data: bytes) -> None:
        """Sends an encoded message of any length; blocks until the connection has taken it or is broken."""
        sent = False
        with self._sending, contextlib.suppress(OSError):
            try:
                self.connection.sendall(data)
                sent = True
            finally:
                if not sent:  # interrupted in the middle, such as by Ctrl-C
                    self.connection.shutdown(socket.SHUT_RDWR)

    def has_closed(self) -> bool:
        """Returns whether the peer has closed the connection and everything that it sent has been read."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def receive(self) -> list[dict[str, Any]] | None:
        """Returns the messages that have arrived, without blocking; None if the connection is closed or misused."""
        try:
            data = self.connection.recv(65536, socket.MSG_DONTWAIT)
            if not data:
                return None
            self.last_heard = time.monotonic()
            *lines, self._unread = (self._unread + data).split(b"\n")
            return [json.loads(line) for line in lines]
        except BlockingIOError:
            return []
        except (OSError, ValueError):
            return None


def rendezvous(rank: Rank, start_seconds: int, secret: bytes) -> dict[int, Peer]:
    """Waits until all processes of the job have connected.

    Args:
      rank: this process.
      start_seconds: when to give up.
      secret: that of the job, without which nobody is believed.

    Returns:
      The peers by index: for process 0 all others, for any other process only process 0.

    Raises:
      JobError: for a process that has not connected in time, and for two processes with the same number.
      ConfigError: for a process of a job of another size, and for a port that cannot be used.
    """
    accept = _accept_all if rank.index == 0 else _connect
    return accept(rank, time.monotonic() + start_seconds, start_seconds, secret)


def _accept_all(rank: Rank, deadline: float, seconds: int, secret: bytes) -> dict[int, Peer]:
    """Accepts a connection from each of the others, on process 0; a peer that closes its connection must retry."""
    most = MOST_UNPROVED + rank.count
    _raise_file_limit(rank.count + most)
    peers: dict[int, Peer] = {}
    challenges: dict[int, str] = {}
    with listen(rank, bind_host(rank)) as listener, contextlib.closing(Newcomers(listener, secret, most)) as newcomers:
        while True:
            peers = {index: peer for index, peer in peers.items() if not peer.has_closed()}
            if len(peers) == rank.count - 1:
                break
            left = deadline - time.monotonic()
            if left <= 0:
                missing = [index for index in range(1, rank.count) if index not in peers]
                late = JobError(_describe_missing(missing, rank, seconds), missing[0])
                raise _notify(peers, challenges, secret, late)
            try:
                arrived = newcomers.wait(min(left, _LOOK_SECONDS))
            except OSError as error:
                why = f"process 0 cannot hold a connection to each of the others ({error.strerror})"
                raise JobError(why) from error
            for newcomer in arrived:
                peer = _peer_of(newcomer, rank, secret)
                if peer is None:
                    continue
                earlier = peers.get(peer.index)
                if (earlier is not None and not earlier.has_closed()) or peer.index == 0:
                    twice = f"process {peer.index} has connected twice, from {earlier or 'process 0'} and from {peer}"
                    peers[-1], challenges[-1] = peer, newcomer.challenges
                    raise _notify(peers, challenges, secret, JobError(f"{twice}; give each its own number"))
                peers[peer.index], challenges[peer.index] = peer, newcomer.challenges
    answer = {"host": socket.gethostname(), "pid": os.getpid()}
    for index, peer in peers.items():
        peer.send_all(handshake.signed(secret, challenges[index], answer))
    return peers


def _peer_of(newcomer: Newcomer, rank: Rank, secret: bytes) -> Peer | None:
    """Returns the process that a connection is from; None, after an answer, for one of a job of another size."""
    message, connection = newcomer.message, newcomer.connection
    connection.setblocking(True)
    index = message.get("index")
    if message.get("job") != _job(rank) or type(index) is not int or not 0 <= index < rank.count:
        refused = {"refused": f"this is a job of {_job(rank)}"}
        with contextlib.suppress(OSError), connection:
            connection.send(handshake.signed(secret, newcomer.challenges, refused), socket.MSG_DONTWAIT)
        return None
    where = f"{message.get('host')}, {newcomer.address}, pid {message.get('pid')}"
    return Peer(index, printable(str(where)[:_LONGEST_NAME]), connection)


def _raise_file_limit(count: int) -> None:
    """Lets this process hold so many connections more: the usual limit is 1,024 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _connect(rank: Rank, deadline: float, seconds: int, secret: bytes) -> dict[int, Peer]:
    """Connects to process 0, on any other process, and waits for its answer that all have connected."""
    problem = "nothing answers"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(rank.address, timeout=min(left, _CONNECT_SECONDS))
        except OSError as error:  # process 0 may not have started yet, or its name may not resolve yet
            problem = error.strerror or str(error)
            time.sleep(_RETRY_SECONDS)
            continue
        answer = _shake_hands(connection, rank, deadline, secret)
        if answer is None:  # process 0, or an earlier listener at its port, has ended; or it has another secret
            problem = f"what answers there has ended, is not of this job, or has another workdir or {VARIABLE}"
            connection.close()
            time.sleep(_RETRY_SECONDS)
            continue
        if "refused" in answer:
            raise ConfigError(
                f"process {rank.index} of {_job(rank)} connected to process 0 at {rank.coordinator}, but "
                f"{answer['refused']}; start them all alike"
            )
        if "failed" in answer:
            raise JobError(answer["failed"], answer["blamed"])
        connection.settimeout(None)
        where = f"{answer.get('host')}, {rank.coordinator}, pid {answer.get('pid')}"
        return {0: Peer(0, printable(str(where)[:_LONGEST_NAME]), connection)}
    raise JobError(
        f"process 0 did not answer at {rank.coordinator} for {seconds} s ({problem}); see whether it runs, and whether "
        "this host can reach that address (deadlines.start_seconds)",
        blamed=0,
    )


def _shake_hands(connection: socket.socket, rank: Rank, deadline: float, secret: bytes) -> dict[str, Any] | None:
    """Returns what process 0 answers once all have connected; None if it is not process 0 of this job."""
    line = _read_line(connection, min(deadline, time.monotonic() + _CONNECT_SECONDS))
    theirs = (handshake.parsed(line or b"") or {}).get("challenge")
    if not isinstance(theirs, str):
        return None
    ours = handshake.new_challenge()
    message = {"job": _job(rank), "index": rank.index, "host": socket.gethostname(), "pid": os.getpid()}
    try:
        connection.sendall(handshake.signed(secret, theirs, {**message, "challenge": ours}))
    except OSError:
        return None
    line = _read_line(connection, deadline + 10)  # leaves time for process 0 to report which one is missing
    return None if line is None else handshake.opened(secret, f"{theirs} {ours}", line)


def _read_line(connection: socket.socket, deadline: float) -> bytes | None:
    """Returns the next line, None if there is none in time; reads byte by byte, to leave what follows unread."""
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < handshake.LONGEST:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            byte = connection.recv(1)
            if not byte:
                return None
            data += byte
    except OSError:
        return None
    return data


def encode(**message: Any) -> bytes:
    """Returns a message as it is sent: one line of JSON."""
    return json.dumps(message).encode() + b"\n"


def _job(rank: Rank) -> str:
    return f"{rank.count} processes"


def _notify(peers: dict[int, Peer], challenges: dict[int, str], secret: bytes, error: JobError) -> JobError:
    """Returns the error, after sending it to the peers."""
    for index, peer in peers.items():
        message = {"failed": str(error), "blamed": error.blamed}
        peer.send_all(handshake.signed(secret, challenges[index], message))
    return error


def _describe_missing(missing: list[int], rank: Rank, seconds: int) -> str:
    named = ", ".join(map(str, missing[:_MOST_NAMED]))
    more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
    single = len(missing) == 1
    return (
        f"process{'' if single else 'es'} {named}{more} of {rank.count} did not connect to {rank.coordinator} within "
        f"{seconds} s; see whether {'it runs' if single else 'they run'} and can reach that address "
        "(deadlines.start_seconds)"
    )

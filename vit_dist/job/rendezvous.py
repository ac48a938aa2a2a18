"""How the processes of a job connect to each other, and the connections that they keep, apart from jax's own.

Every process connects to process 0 at the coordinator's address and sends its number (`rendezvous`). When all have
connected, the port is free for jax and the connections stay open. The kernel closes the connection of a process that
dies, at once. The connection to a machine that is cut off falls silent. A process that fails sends the others the
reason. In each case `watchdog` reports on the remaining processes which one was lost, and ends them: jax would wait in
a collective for minutes or forever.
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
_CONNECT_SECONDS = 5  # for one attempt: the name may resolve to another machine in the meantime
_HANDSHAKE_SECONDS = 5  # in which a new connection must send its handshake
_MOST_NAMED = 8


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


def rendezvous(rank: Rank, start_seconds: int) -> dict[int, Peer]:
    """Waits until all processes of the job have connected.

    Args:
      rank: this process.
      start_seconds: when to give up.

    Returns:
      The peers by index: for process 0 all others, for any other process only process 0.

    Raises:
      JobError: for a process that has not connected in time, and for two processes with the same number.
      ConfigError: for a process of a job of another size, and for a port that cannot be used.
    """
    deadline = time.monotonic() + start_seconds
    return _accept_all(rank, deadline, start_seconds) if rank.index == 0 else _connect(rank, deadline, start_seconds)


def _accept_all(rank: Rank, deadline: float, seconds: int) -> dict[int, Peer]:
    """Accepts a connection from each of the others, on process 0; a peer that closes its connection must retry."""
    _raise_file_limit(rank.count)
    peers: dict[int, Peer] = {}
    with _listen(rank) as listener:
        while True:
            peers = {index: peer for index, peer in peers.items() if not peer.has_closed()}
            if len(peers) == rank.count - 1:
                break
            connection, address = _accept(listener, deadline)
            if connection is None:
                missing = [index for index in range(1, rank.count) if index not in peers]
                raise _notify(peers, JobError(_describe_missing(missing, rank, seconds), missing[0]))
            handshake = _read_message(connection, time.monotonic() + _HANDSHAKE_SECONDS)
            if handshake is None or handshake.get("job") != _job(rank):  # a port scanner, or a process of another job
                if handshake is not None and "index" in handshake:
                    Peer(-1, "", connection).send(refused=f"this is a job of {_job(rank)}")
                connection.close()
                continue
            connection.settimeout(None)
            peer = Peer(int(handshake["index"]), f"{handshake['host']}, {address}, pid {handshake['pid']}", connection)
            earlier = peers.get(peer.index)
            if (earlier is not None and not earlier.has_closed()) or not 0 < peer.index < rank.count:
                error = f"process {peer.index} has connected twice, from {earlier or 'process 0'} and from {peer}; "
                raise _notify({**peers, -1: peer}, JobError(f"{error}give each its own number"))
            peers[peer.index] = peer
    answer = encode(host=socket.gethostname(), pid=os.getpid())
    for peer in peers.values():
        peer.send_all(answer)
    return peers


def _accept(listener: socket.socket, deadline: float) -> tuple[socket.socket | None, str]:
    """Returns the next connection and the address it comes from; no connection if none comes before the deadline."""
    left = deadline - time.monotonic()
    if left <= 0:
        return None, ""
    listener.settimeout(left)
    try:
        connection, address = listener.accept()
    except TimeoutError:
        return None, ""
    except OSError as error:
        raise JobError(f"process 0 cannot hold a connection to each of the others ({error.strerror})") from error
    return connection, address[0].removeprefix("::ffff:")  # an IPv4 address in IPv6 notation


def _raise_file_limit(count: int) -> None:
    """Lets this process hold a connection to each of the others: the usual limit is 1,024 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _connect(rank: Rank, deadline: float, seconds: int) -> dict[int, Peer]:
    """Connects to process 0, on any other process, and waits for its answer that all have connected."""
    problem = "nothing answers"
    handshake = encode(job=_job(rank), index=rank.index, host=socket.gethostname(), pid=os.getpid())
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection(rank.address, timeout=min(left, _CONNECT_SECONDS))
            connection.sendall(handshake)
        except OSError as error:  # process 0 may not have started yet, or its name may not resolve yet
            problem = error.strerror or str(error)
            time.sleep(_RETRY_SECONDS)
            continue
        answer = _read_message(connection, deadline + 10)  # leaves time for process 0 to report which one is missing
        if answer is None:  # process 0, or an earlier listener at its port, has ended
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
        return {0: Peer(0, f"{answer['host']}, {rank.coordinator}, pid {answer['pid']}", connection)}
    raise JobError(
        f"process 0 did not answer at {rank.coordinator} for {seconds} s ({problem}); see whether it runs, and whether "
        "this host can reach that address (deadlines.start_seconds)",
        blamed=0,
    )


def _listen(rank: Rank) -> socket.socket:
    port, dual = rank.address[1], socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=rank.count, dualstack_ipv6=dual)
    except OSError as error:
        raise ConfigError(
            f"{rank.coordinator}: process 0 cannot listen at port {port} ({error.strerror}); choose another"
        ) from error


def _read_message(connection: socket.socket, deadline: float) -> dict[str, Any] | None:
    """Returns the next message, None if there is none in time; reads byte by byte, to leave what follows unread."""
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < 65536:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            byte = connection.recv(1)
            if not byte:
                return None
            data += byte
        message = json.loads(data)
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None


def encode(**message: Any) -> bytes:
    """Returns a message as it is sent: one line of JSON."""
    return json.dumps(message).encode() + b"\n"


def _job(rank: Rank) -> str:
    return f"{rank.count} processes"


def _notify(peers: dict[int, Peer], error: JobError) -> JobError:
    """Returns the error, after sending it to the peers."""
    for peer in peers.values():
        peer.send(failed=str(error), blamed=error.blamed)
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

"""The connections that process 0 accepts, until each has proved that it is of the job.

Anybody may connect. All connections are read at once, each for `HANDSHAKE_SECONDS` at most, and only so many are kept
that have not proved anything: the oldest of more is dropped. What is dropped is logged, the first few in full.
"""

import contextlib
import dataclasses
import errno
import logging
import selectors
import socket
import time
from typing import Any

from vit_dist.job import handshake

HANDSHAKE_SECONDS = 5  # in which a new connection must send its handshake
MOST_UNPROVED = 64  # connections, beside one for each process of the job
_MOST_LOGGED = 10
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class Newcomer:
    """A connection; `message` is what it sent once it has proved to know the secret."""

    connection: socket.socket
    address: str
    challenge: str
    deadline: float
    message: dict[str, Any] = dataclasses.field(default_factory=dict)
    data: bytes = b""

    @property
    def challenges(self) -> str:
        """Both challenges, for the answer."""
        return f"{self.challenge} {self.message.get('challenge')}"


class Newcomers:
    """Those who have connected to `listener` and not yet proved that they know `secret`."""

    def __init__(self, listener: socket.socket, secret: bytes, most: int) -> None:
        self._listener, self._secret, self._most = listener, secret, most
        self._dropped = 0
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._unproved: dict[socket.socket, Newcomer] = {}  # the oldest first

    def wait(self, seconds: float) -> list[Newcomer]:
        """Returns those who have proved it, after `seconds` at most. Raises OSError where too many files are open."""
        proved = []
        for key, _ in self._selector.select(max(0.0, seconds)):
            if key.fileobj is self._listener:
                self._accept()
            elif (newcomer := self._unproved.get(key.fileobj)) and self._read(newcomer):  # type: ignore[call-overload]
                proved.append(newcomer)
        now = time.monotonic()
        for newcomer in [newcomer for newcomer in self._unproved.values() if newcomer.deadline < now]:
            self._drop(newcomer, f"no handshake within {HANDSHAKE_SECONDS} s")
        return proved

    def close(self) -> None:
        """Closes those that have proved nothing."""
        for newcomer in list(self._unproved.values()):
            self._forget(newcomer)
            newcomer.connection.close()
        self._selector.close()
        if self._dropped > _MOST_LOGGED:
            _log.warning("dropped %d connections in all that were not of this job", self._dropped)

    def _accept(self) -> None:
        try:
            connection, address = self._listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            return  # it has gone meanwhile
        connection.setblocking(False)
        where = str(address[0]).removeprefix("::ffff:")  # an IPv4 address in IPv6 notation
        newcomer = Newcomer(connection, where, handshake.new_challenge(), time.monotonic() + HANDSHAKE_SECONDS)
        self._unproved[connection] = newcomer
        self._selector.register(connection, selectors.EVENT_READ)
        with contextlib.suppress(OSError):  # it has gone: the next read finds its end
            connection.send(handshake.challenged(newcomer.challenge))
        if len(self._unproved) > self._most:
            self._drop(next(iter(self._unproved.values())), "too many connections without a handshake")

    def _read(self, newcomer: Newcomer) -> bool:
        """Reads what has arrived; returns whether that is a handshake of this job."""
        try:
            data = newcomer.connection.recv(handshake.LONGEST + 1)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        newcomer.data += data
        line, end, rest = newcomer.data.partition(b"\n")
        if not data:
            self._drop(newcomer, "closed without a handshake")
        elif len(newcomer.data) > handshake.LONGEST:
            self._drop(newcomer, f"more than {handshake.LONGEST} bytes")
        elif end:
            message = handshake.opened(self._secret, newcomer.challenge, line)
            if message is not None and not rest:
                self._forget(newcomer)
                newcomer.message = message
                return True
            self._drop(newcomer, "no handshake of this job, or another secret")
        return False

    def _forget(self, newcomer: Newcomer) -> None:
        self._selector.unregister(newcomer.connection)
        del self._unproved[newcomer.connection]

    def _drop(self, newcomer: Newcomer, why: str) -> None:
        self._forget(newcomer)
        newcomer.connection.close()
        self._dropped += 1
        if self._dropped <= _MOST_LOGGED:
            _log.warning("dropped a connection from %s: %s", newcomer.address, why)

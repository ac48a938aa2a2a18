"""How the processes of a job agree on when to stop.

A signal may reach one process and not the others, and each at another moment. All processes call `reached` equally
often, after each step and each batch of an evaluation. Whoever is asked to stop tells process 0, which asks all for the
number of their calls. A process that has answered makes no further call before it knows the result. All stop at the
call after the largest number. If nobody has made a call, nothing is done yet that could be saved.
"""

import threading
from collections.abc import Callable, Mapping
from typing import Any

from vit_dist.job.exit_codes import INTERRUPTED
from vit_dist.job.rendezvous import Peer, encode

NEVER_BEGUN = 0  # the largest number of calls where no process has finished a step


class Agreement:
    """One process's part in it. `receive` and `peer_left` are called by the watchdog's thread, others by any.

    Attributes:
      code: the exit code with which all stop, 75 or 130; None until they have agreed.
    """

    def __init__(self, index: int, peers: Mapping[int, Peer], end_all: Callable[[int], None]) -> None:
        """Makes it for process `index`, whose `end_all` ends all processes with a code, before the first call."""
        self.code: int | None = None
        self._index, self._peers, self._end_all = index, peers, end_all
        self._calls = 0
        self._stop_at: int | None = None
        self._answered = False  # this process has told how many calls it has made
        self._asked = False  # process 0 has asked the others
        self._counts: dict[int, int] = {}  # on process 0: index -> number of calls
        self._codes: set[int] = set()
        self._agreed = threading.Condition()

    def reached(self) -> bool:
        """Returns whether all processes stop at this call."""
        with self._agreed:
            self._agreed.wait_for(lambda: self._stop_at is not None or not self._answered)
            self._calls += 1
            return self._calls == self._stop_at

    def ask(self, code: int | None) -> None:
        """Asks all to stop, with this exit code; None: answers another process that does."""
        with self._agreed:
            if self._answered:
                return
            self._answered, calls = True, self._calls
        if self._index == 0:
            self._note(0, calls, code)
        else:
            self._peers[0].send_all(encode(calls=calls, code=code))

    def receive(self, peer: Peer, message: Mapping[str, Any]) -> None:
        """Takes a message of another process's agreement."""
        if "calls" in message:
            self._note(peer.index, message["calls"], message["code"])
        elif "asked" in message:
            self.ask(None)
        else:
            self._settle(message["stop_at"], message["code"])

    def peer_left(self) -> None:
        """A peer is gone, whose answer nobody should wait for."""
        if self._asked:
            self._conclude()

    def _note(self, index: int, calls: int, code: int | None) -> None:
        """Notes an answer, on process 0; asks the others at the first."""
        with self._agreed:
            self._counts[index] = calls
            if code is not None:
                self._codes.add(code)
            is_first, self._asked = not self._asked, True
        if is_first:
            for peer in self._peers.values():
                peer.send_all(encode(asked=True))
            self.ask(None)
        self._conclude()

    def _conclude(self) -> None:
        """Tells all when to stop, on process 0, once all have answered."""
        with self._agreed:
            waiting = [index for index, peer in self._peers.items() if not peer.left and index not in self._counts]
            if waiting or 0 not in self._counts or self.code is not None:
                return
            most = max(self._counts.values())
            code = INTERRUPTED if INTERRUPTED in self._codes else min(self._codes)
            self.code = code
        if most == NEVER_BEGUN:
            self._end_all(code)
            return
        for peer in self._peers.values():
            peer.send_all(encode(stop_at=most + 1, code=code))
        self._settle(most + 1, code)

    def _settle(self, stop_at: int, code: int) -> None:
        with self._agreed:
            self._stop_at, self.code = stop_at, code
            self._agreed.notify_all()

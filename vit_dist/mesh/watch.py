"""A thread that watches over a process and its peers, and ends the process when they can not go on together.

A process whose peer is gone sits in a collective that will never end, in code that Python cannot interrupt. So this
thread says what is wrong and ends the process itself. Process 0 hears all others, and judges: a line that has ended is
a process that died, a silent one a machine that is cut off, and a process that begins no step while the clock runs is
stuck. The others hear process 0 alone, and are told its judgement.
"""

import faulthandler
import multiprocessing
import os
import select
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from vit_dist import config
from vit_dist.exit_codes import FAILED
from vit_dist.mesh.peers import Peer

GRACE_SECONDS = 3.0  # for a process to end by itself, with its own words, when a peer says that it has failed
_BEATS = 10  # in the time after which silence means that a peer is lost


class Watch:
    """The thread; runs from its making until `stop`. peers: by index, none for a process that is alone.

    The clock of a step runs from the first call of `alive` until `rest`.
    """

    def __init__(self, index: int, peers: Mapping[int, Peer], deadlines: config.Deadlines):
        self.index, self.peers, self.deadlines = index, dict(peers), deadlines
        self._step = 0
        self._stepped: float | None = None  # when it began; None: the clock stands
        self._gathered: dict[int, dict[int, Any]] = {}  # number of the gathering -> index -> value
        self._answered: dict[int, list[Any]] = {}  # number of the gathering -> the value of each process
        self._gatherings = 0
        self._news = threading.Condition()
        self._verdict = threading.Event()
        self._stopping = threading.Event()
        self._failing = threading.Lock()  # whoever holds it says the last word of this process
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def alive(self, step: int | None = None) -> None:
        """The main thread has begun `step`, or (None) another part of the one it is at."""
        self._step = self._step if step is None else step
        self._stepped = time.monotonic()

    def rest(self) -> None:
        """Stops the clock: what comes now may take as long as it likes."""
        self._stepped = None

    def gather(self, value: Any) -> list[Any]:
        """What JSON can hold -> the value of each process; all must call it, and none returns before the last has."""
        self._gatherings += 1
        number = self._gatherings
        if self.index:
            self.peers[0].send_all(gather=number, value=value)
            with self._news:
                self._news.wait_for(lambda: number in self._answered)
                return self._answered.pop(number)
        with self._news:
            given = self._gathered.setdefault(number, {})
            self._news.wait_for(lambda: len(given) == len(self.peers))
            del self._gathered[number]
        values = [value, *(given[index] for index in sorted(given))]
        for peer in self.peers.values():
            peer.send_all(gathered=number, values=values)
        return values

    def say_failed(self, text: str, code: int) -> None:
        """Tells the peers that this process ends with an error of its own."""
        self._failing.acquire()
        self._stopping.set()
        for peer in self.peers.values():
            peer.send(failed=text, code=code)
        self._outlast()

    def wait_for_verdict(self) -> None:
        """Returns if in the time that a silence may last no peer is found lost; else the process ends meanwhile."""
        if self._verdict.wait(self.deadlines.peer_seconds * (1 + 1 / _BEATS)):
            time.sleep(2 * GRACE_SECONDS)

    def stop(self) -> None:
        """Says goodbye: whatever this process does from here on is no failure."""
        for peer in self.peers.values():
            peer.send(bye=True)
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        beat = max(0.1, min(5.0, self.deadlines.peer_seconds / _BEATS))
        next_beat = time.monotonic()
        while not self._stopping.is_set():
            now = time.monotonic()
            if now >= next_beat:
                next_beat = now + beat
                ago = None if self._stepped is None else round(now - self._stepped, 1)
                for peer in self.peers.values():
                    peer.send(step=self._step, ago=ago)
                self._judge(now)
            lines = {peer.line: peer for peer in self.peers.values() if not peer.left}
            ready, _, _ = select.select(list(lines), [], [], min(0.25, beat)) if lines else ([], [], [])
            if not lines:
                self._stopping.wait(min(0.25, beat))
            for line in ready:
                self._hear(lines[line])

    def _hear(self, peer: Peer) -> None:
        messages = peer.receive()
        if messages is None:
            if not peer.left and not self._stopping.is_set():
                self._lost(f"{peer} was lost: its connection has closed without a word; it was killed, or has crashed")
            peer.left = True
            return
        for message in messages:
            if "bye" in message:
                peer.left = True
            elif "verdict" in message:
                self._conclude(message["verdict"], message["code"], message["grace"], message["stuck"])
            elif "failed" in message:
                self._failed(peer, message["failed"], message["code"])
            elif "gather" in message:
                with self._news:
                    self._gathered.setdefault(message["gather"], {})[peer.index] = message["value"]
                    self._news.notify_all()
            elif "gathered" in message:
                with self._news:
                    self._answered[message["gathered"]] = message["values"]
                    self._news.notify_all()
            elif "step" in message:
                ago = message["ago"]
                peer.step, peer.stepped = message["step"], None if ago is None else time.monotonic() - ago

    def _judge(self, now: float) -> None:
        """Looks for peers that have fallen silent and, on process 0, for processes that are stuck."""
        for peer in self.peers.values():
            silent = now - peer.heard
            if not peer.left and silent > self.deadlines.peer_seconds:
                self._lost(
                    f"{peer} was lost: it has said nothing for {silent:.0f} s, so it, its machine or the network to it "
                    "is gone (deadlines.peer_seconds)"
                )
        if self.index == 0:
            self._judge_steps(now)

    def _judge_steps(self, now: float) -> None:
        steps = {f"process {self.index}": self._step} | {str(peer): peer.step for peer in self.peers.values()}
        begun = [self._stepped, *(peer.stepped for peer in self.peers.values())]
        running = [one for one in begun if one is not None]
        if len(running) < len(begun) or now - max(running) <= self.deadlines.step_seconds:
            return
        first, last = min(steps.values()), max(steps.values())
        behind = [name for name, step in steps.items() if step < last]
        who = f"; {', '.join(behind[:8])} did not come further than step {first}" if behind else ""
        self._decide(
            f"no process has come further for {now - max(running):.0f} s, since step {last} began{who} "
            "(deadlines.step_seconds); what every thread was doing stands above",
            FAILED, grace=0.0, stuck=True,
        )  # fmt: skip

    def _lost(self, text: str) -> None:
        self._decide(text, FAILED, grace=0.0)

    def _failed(self, peer: Peer, text: str, code: int) -> None:
        peer.left = True
        self._decide(f"{peer} failed: {text}", code, GRACE_SECONDS)

    def _decide(self, text: str, code: int, grace: float, stuck: bool = False) -> None:
        """Process 0 tells the rest; any other process has nobody left to tell."""
        for peer in self.peers.values():
            if not peer.left:
                peer.send(verdict=text, code=code, grace=grace, stuck=stuck)
        self._conclude(text, code, grace, stuck)

    def _conclude(self, text: str, code: int, grace: float, stuck: bool) -> None:
        """Ends this process, after `grace` seconds in which it may still end by itself."""
        self._verdict.set()
        if self._stopping.wait(grace) or not self._failing.acquire(blocking=False):
            return
        if stuck:
            faulthandler.dump_traceback(2, all_threads=True)
        print(f"error: {text}", file=sys.stderr, flush=True)
        self._stopping.set()
        self._outlast()
        end_now(code)

    def _outlast(self) -> None:
        """Process 0 waits until the others have ended: with it ends jax's service, at which jax aborts them."""
        if self.index:
            return
        deadline = time.monotonic() + GRACE_SECONDS + 1
        waiting = {peer.line: peer for peer in self.peers.values()}
        while waiting and (left := deadline - time.monotonic()) > 0:
            for line in select.select(list(waiting), [], [], left)[0]:
                if waiting[line].receive() is None:
                    del waiting[line]


def end_now(code: int) -> None:
    """Ends the process and those that it has started, without the farewells in which jax waits for its peers."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""A thread that watches over a process and its peers, and ends the process when they can not go on together.

A process whose peer is gone sits in a collective that will never end, in code that Python cannot interrupt. So this
thread says what is wrong and ends the process itself. Process 0 hears all others, and judges: a line that has ended is
a process that died, a silent one a machine that is cut off, and where no process comes further while the clock of a
step runs, one is stuck. The others hear process 0 alone, and are told its judgement.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import selectors
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

from vit_dist import config
from vit_dist.exit_codes import FAILED
from vit_dist.mesh.peers import Peer, as_line

GRACE_SECONDS = 3.0  # for a process to end by itself, with its own words, when a peer says that it has failed
_BEATS = 10  # in the time after which silence means that a peer is lost
_MOST_NAMED = 8


class Watch:
    """The thread; runs from its making until `stop`. peers: by index, none for a process that is alone.

    The clock of a step runs from the first call of `alive` until `rest`.
    """

    def __init__(self, index: int, peers: Mapping[int, Peer], deadlines: config.Deadlines):
        self.index, self.peers, self.deadlines = index, dict(peers), deadlines
        self._beat = max(0.1, min(5.0, deadlines.peer_seconds / _BEATS))
        self._step = 0
        self._stepped: float | None = None  # when it began; None: the clock stands
        self._gathered: dict[int, dict[int, Any]] = {}  # number of the gathering -> index -> value
        self._answered: dict[int, list[Any]] = {}  # number of the gathering -> the value of each process
        self._gatherings = 0
        self._news = threading.Condition()
        self._verdict = threading.Event()
        self._stopping = threading.Event()
        self._last_word = threading.Lock()  # whoever holds it says why this process ends
        self._ready = selectors.DefaultSelector()
        for peer in self.peers.values():
            self._ready.register(peer.line, selectors.EVENT_READ, peer)
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
            self.peers[0].send_all(as_line(gather=number, value=value))
            with self._news:
                self._news.wait_for(lambda: number in self._answered)
                return self._answered.pop(number)
        with self._news:
            given = self._gathered.setdefault(number, {})
            self._news.wait_for(lambda: len(given) == len(self.peers))
            del self._gathered[number]
        values = [value, *(given[index] for index in sorted(given))]
        line = as_line(gathered=number, values=values)
        for peer in self.peers.values():
            peer.send_all(line)
        return values

    def say_failed(self, text: str, code: int) -> None:
        """Tells the peers that this process ends with an error of its own."""
        self._last_word.acquire()
        self._stopping.set()
        for peer in self.peers.values():
            peer.send(failed=text, code=code)
        self._outlast()

    def wait_for_verdict(self) -> None:
        """Returns if in the time that a silence may last no peer is found lost; else the process ends meanwhile."""
        if self.peers and self._verdict.wait(self.deadlines.peer_seconds * (1 + 1 / _BEATS)):
            time.sleep(2 * GRACE_SECONDS)

    def stop(self) -> None:
        """Says goodbye: whatever this process does from here on is no failure."""
        for peer in self.peers.values():
            peer.send(bye=True)
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        """All that the thread does. A watch that has gone wrong ends the process: unwatched it might wait for ever."""
        ended_well = False
        try:
            self._watch()
            ended_well = True
        finally:
            if not ended_well:
                _say(traceback.format_exc())
                end_now(FAILED)

    def _watch(self) -> None:
        looked = next_beat = time.monotonic()
        while not self._stopping.is_set():
            for key, _ in self._ready.select(0) or self._wait():
                self._hear(key.data)
            now = time.monotonic()
            if now - looked > self.deadlines.peer_seconds / 2:
                self._wake(now)
            looked = now
            if now >= next_beat:
                next_beat = now + self._beat
                ago = None if self._stepped is None else round(now - self._stepped, 1)
                for peer in self.peers.values():
                    peer.send(step=self._step, ago=ago)
                self._judge(now)

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        if self._ready.get_map():
            return self._ready.select(min(0.25, self._beat))
        self._stopping.wait(min(0.25, self._beat))
        return []

    def _wake(self, now: float) -> None:
        """After a time in which this process itself stood still, with its job or its machine: no silence counts."""
        for peer in self.peers.values():
            peer.heard = now
        if self._stepped is not None:
            self._stepped = now

    def _hear(self, peer: Peer) -> None:
        messages = peer.receive()
        if messages is None:
            self._ready.unregister(peer.line)
            left, peer.left = peer.left, True
            if not left and not self._stopping.is_set():
                self._lost(f"{peer} was lost: its connection has closed without a word; it was killed, or has crashed")
            return
        for message in messages:
            if "bye" in message:
                peer.left = True
            elif "verdict" in message:
                self._conclude(message["verdict"], message["code"], message["grace"], message["stuck"])
            elif "failed" in message:
                peer.left = True
                self._decide(f"{peer} failed: {message['failed']}", message["code"], GRACE_SECONDS)
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
        last = max(steps.values())
        behind = [f"{name} did not come further than step {step}" for name, step in steps.items() if step < last]
        more = [f"{len(behind) - _MOST_NAMED} more neither"] if len(behind) > _MOST_NAMED else []
        self._decide(
            f"no process has come further for {now - max(running):.0f} s, since step {last} began; "
            + "".join(f"{one}; " for one in behind[:_MOST_NAMED] + more)
            + "what every thread was doing stands above (deadlines.step_seconds)",
            FAILED, grace=0.0, stuck=True,
        )  # fmt: skip

    def _lost(self, text: str) -> None:
        self._decide(text, FAILED, grace=0.0)

    def _decide(self, text: str, code: int, grace: float, stuck: bool = False) -> None:
        """Process 0 tells the rest; any other process has nobody left to tell."""
        for peer in self.peers.values():
            if not peer.left:
                peer.send(verdict=text, code=code, grace=grace, stuck=stuck)
        self._conclude(text, code, grace, stuck)

    def _conclude(self, text: str, code: int, grace: float, stuck: bool) -> None:
        """Ends this process, after `grace` seconds in which it may still end by itself."""
        self._verdict.set()
        if self._stopping.wait(grace) or not self._last_word.acquire(blocking=False):
            return
        if stuck:
            with contextlib.suppress(OSError):
                faulthandler.dump_traceback(2, all_threads=True)
        _say(f"error: {text}")
        self._stopping.set()
        self._outlast()
        end_now(code)

    def _outlast(self) -> None:
        """Process 0 waits until the others have ended: with it ends jax's service, at which jax aborts them."""
        if self.index:
            return
        deadline = time.monotonic() + GRACE_SECONDS + 1
        with selectors.DefaultSelector() as waiting:
            for peer in self.peers.values():
                waiting.register(peer.line, selectors.EVENT_READ, peer)
            while waiting.get_map() and (left := deadline - time.monotonic()) > 0:
                for key, _ in waiting.select(left):
                    if key.data.receive() is None:
                        waiting.unregister(key.fileobj)


def end_now(code: int) -> None:
    """Ends the process and those that it has started, without the farewells in which jax waits for its peers."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more, or its disk is full
            stream.flush()
    os._exit(code)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # as in `end_now`: what cannot be said must not keep it from ending
        print(text, file=sys.stderr, flush=True)

"""The watchdog: a thread that ends its process when the processes of the job cannot go on together.

A process whose peer is gone waits in a collective that never ends, in code that Python cannot interrupt. So this thread
says what is wrong and ends the process itself. Process 0 receives from all others, and decides: a connection that has
ended is a process that died, a silent one a machine that is cut off, and where no process gets further while the clock
of a step runs, one is stuck. The others receive from process 0 alone, and are sent its verdict.
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
from vit_dist.job.blame import Blame
from vit_dist.job.exit_codes import FAILED
from vit_dist.job.rendezvous import Peer, encode

GRACE_SECONDS = 3.0  # for a process to end by itself, with its own words, when a peer says that it has failed
_BEATS = 10  # in the time after which silence means that a peer is lost
_MOST_NAMED = 8


class Watchdog:
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
            self._ready.register(peer.connection, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
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
            self.peers[0].send_all(encode(gather=number, value=value))
            with self._news:
                self._news.wait_for(lambda: number in self._answered)
                return self._answered.pop(number)
        with self._news:
            given = self._gathered.setdefault(number, {})
            self._news.wait_for(lambda: len(given) == len(self.peers))
            del self._gathered[number]
        values = [value, *(given[index] for index in sorted(given))]
        line = encode(gathered=number, values=values)
        for peer in self.peers.values():
            peer.send_all(line)
        return values

    def report_failure(self, text: str, code: int) -> None:
        """Tells the peers that this process ends with an error of its own."""
        self._last_word.acquire()
        self._stopping.set()
        for peer in self.peers.values():
            peer.send(failed=text, code=code)
        self._wait_for_others()

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
        """All that the thread does. A fault of its own ends the process, which unwatched might wait for ever."""
        ended_well = False
        try:
            self._watch()
            ended_well = True
        finally:
            if not ended_well:
                _print(traceback.format_exc())
                end_now(FAILED)

    def _watch(self) -> None:
        looked = next_beat = time.monotonic()
        while not self._stopping.is_set():
            for key, _ in self._ready.select(0) or self._wait():
                self._receive(key.data)
            now = time.monotonic()
            if now - looked > self.deadlines.peer_seconds / 2:
                self._forgive(now)
            looked = now
            if now >= next_beat:
                next_beat = now + self._beat
                ago = None if self._stepped is None else round(now - self._stepped, 1)
                for peer in self.peers.values():
                    peer.send(step=self._step, ago=ago)
                self._check_peers(now)

    def _wait(self) -> list[tuple[selectors.SelectorKey, int]]:
        if self._ready.get_map():
            return self._ready.select(min(0.25, self._beat))
        self._stopping.wait(min(0.25, self._beat))
        return []

    def _forgive(self, now: float) -> None:
        """After a time in which this process itself stood still, with its job or its machine: no silence counts."""
        for peer in self.peers.values():
            peer.heard = now
        if self._stepped is not None:
            self._stepped = now

    def _receive(self, peer: Peer) -> None:
        messages = peer.receive()
        if messages is None:
            self._ready.unregister(peer.connection)
            left, peer.left = peer.left, True
            if not left and not self._stopping.is_set():
                self._lost(peer, "its connection has closed without a word; it was killed, or has crashed")
            return
        for message in messages:
            if "bye" in message:
                peer.left = True
            elif "verdict" in message:
                self._conclude(**message["verdict"])
            elif "failed" in message:
                peer.left = True
                self._decide(f"{peer} failed: {message['failed']}", message["code"], peer.index, GRACE_SECONDS)
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

    def _check_peers(self, now: float) -> None:
        """Looks for peers that have fallen silent and, on process 0, for processes that are stuck."""
        for peer in self.peers.values():
            silent = now - peer.heard
            if not peer.left and silent > self.deadlines.peer_seconds:
                self._lost(
                    peer,
                    f"it has said nothing for {silent:.0f} s, so it, its machine or the network to it is gone "
                    "(deadlines.peer_seconds)",
                )
        if self.index == 0:
            self._check_steps(now)

    def _check_steps(self, now: float) -> None:
        steps = {self.index: self._step} | {index: peer.step for index, peer in self.peers.items()}
        names = {self.index: f"process {self.index}"} | {index: str(peer) for index, peer in self.peers.items()}
        begun = [self._stepped, *(peer.stepped for peer in self.peers.values())]
        running = [moment for moment in begun if moment is not None]
        if len(running) < len(begun) or now - max(running) <= self.deadlines.step_seconds:
            return
        last = max(steps.values())
        behind = [index for index, step in steps.items() if step < last]
        named = [f"{names[index]} did not come further than step {steps[index]}" for index in behind[:_MOST_NAMED]]
        more = [f"{len(behind) - _MOST_NAMED} more neither"] if len(behind) > _MOST_NAMED else []
        self._decide(
            f"no process has come further for {now - max(running):.0f} s, since step {last} began; "
            + "".join(f"{text}; " for text in named + more)
            + "what every thread was doing stands above (deadlines.step_seconds)",
            FAILED, behind[0] if behind else None, grace=0.0, stuck=True,
        )  # fmt: skip

    def _lost(self, peer: Peer, how: str) -> None:
        self._decide(f"{peer} was lost: {how}", FAILED, peer.index, grace=0.0)

    def _decide(self, text: str, code: int, blamed: int | None, grace: float, stuck: bool = False) -> None:
        """Process 0 tells the rest; any other process has nobody left to tell."""
        verdict: dict[str, Any] = {"text": text, "code": code, "blamed": blamed, "grace": grace, "stuck": stuck}
        for peer in self.peers.values():
            if not peer.left:
                peer.send(verdict=verdict)
        self._conclude(**verdict)

    def _conclude(self, text: str, code: int, blamed: int | None, grace: float, stuck: bool) -> None:
        """Ends this process.

        Args:
          text: why, for people.
          code: its exit code.
          blamed: the process that is at fault; None: several, or none that is known.
          grace: seconds in which it may still end by itself.
          stuck: show what every thread is doing.
        """
        self._verdict.set()
        if self._stopping.wait(grace) or not self._last_word.acquire(blocking=False):
            return
        if stuck:
            with contextlib.suppress(OSError):
                faulthandler.dump_traceback(2, all_threads=True)
        _print(f"error: {text}")
        if blamed is not None:
            Blame(blamed, text).report()
        self._stopping.set()
        self._wait_for_others()
        end_now(code)

    def _wait_for_others(self) -> None:
        """Process 0 waits until the others have ended: with it ends jax's service, at which jax aborts them."""
        if self.index:
            return
        deadline = time.monotonic() + GRACE_SECONDS + 1
        with selectors.DefaultSelector() as waiting:
            for peer in self.peers.values():
                waiting.register(peer.connection, selectors.EVENT_READ, peer)
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


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # as in `end_now`: what cannot be said must not keep it from ending
        print(text, file=sys.stderr, flush=True)

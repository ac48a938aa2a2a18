"""The watchdog: a thread that ends its process when the processes of the job cannot go on together.

A process whose peer is lost waits in a collective that never ends, in code that Python cannot interrupt. So this thread
reports the problem and ends the process itself. Process 0 receives from all others and decides. If a connection
closes, its process has died. If a connection is silent, its machine is cut off. If no process makes progress while the
clock of a step runs, a process is stuck. The others receive from process 0 only, which sends them its verdict. The
thread also carries the messages by which all agree on when to stop (`agreement`).
"""

import contextlib
import faulthandler
import selectors
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

from vit_dist import config
from vit_dist.escape import printable_lines
from vit_dist.job.agreement import Agreement
from vit_dist.job.blame import Blame
from vit_dist.job.exit_codes import FAILED, INTERRUPTED, PREEMPTED
from vit_dist.job.rendezvous import Peer, encode
from vit_dist.job.signals import code_of, end_now

GRACE_SECONDS = 3.0  # in which a process may end by itself, with its own message, when a peer reports a failure
_HEARTBEATS = 10  # within `deadlines.peer_seconds`
_MOST_NAMED = 8
_ENDINGS = {PREEMPTED: "preempted", INTERRUPTED: "interrupted"}  # exit codes of processes that did not fail


class Watchdog:
    """The thread; it runs from its construction until `stop`.

    The clock of a step runs from the first call of `alive` until `stop_clock`.
    """

    def __init__(self, index: int, peers: Mapping[int, Peer], deadlines: config.Deadlines):
        """Starts the thread.

        Args:
          index: the number of this process.
          peers: the processes that it is connected to, by number; none for a process that is alone.
          deadlines: after which silence a peer is lost, and after which time a step is stuck.
        """
        self.index, self.peers, self.deadlines = index, dict(peers), deadlines
        self._heartbeat_seconds = max(0.1, min(5.0, deadlines.peer_seconds / _HEARTBEATS))
        self._step = 0
        self._step_began: float | None = None  # None: the clock is stopped
        self._gathered: dict[int, dict[int, Any]] = {}  # call number of `gather` -> index of a peer -> what it sent
        self._gather_calls = 0
        self._agreement = Agreement(index, self.peers, self._end_all)
        self._arrived = threading.Condition()  # notified when a message of `gather` has arrived
        self._verdict = threading.Event()
        self._stopping = threading.Event()
        self._reporting = threading.Lock()  # whoever acquires it reports why this process ends
        self._ready = selectors.DefaultSelector()
        for peer in self.peers.values():
            self._ready.register(peer.connection, selectors.EVENT_READ, peer)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def alive(self, step: int | None = None) -> None:
        """Restarts the clock: the main thread has begun `step`, or (None) the next stage of the current step."""
        self._step = self._step if step is None else step
        self._step_began = time.monotonic()

    def stop_clock(self) -> None:
        """Stops the clock: what follows may take any time."""
        self._step_began = None

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes by number; each must call it, and it returns once all have.

        `value` is anything that JSON can hold.
        """
        self._gather_calls += 1
        call = self._gather_calls
        if self.index:
            self.peers[0].send_all(encode(gather=call, value=value))
        with self._arrived:
            received = self._gathered.setdefault(call, {})
            self._arrived.wait_for(lambda: len(received) == len(self.peers))
            del self._gathered[call]
        if self.index:
            return received[0]
        values = [value, *(received[index] for index in sorted(received))]
        answer = encode(gather=call, value=values)
        for peer in self.peers.values():
            peer.send_all(answer)
        return values

    def ask_to_stop(self, number: int) -> None:
        """Asks all processes to stop: this one has received a signal of that number."""
        self._agreement.ask(code_of({number}))

    def agreed_to_stop(self) -> bool:
        """Returns whether all stop here; each calls it equally often, see `agreement`."""
        return self._agreement.reached()

    def stop_code(self) -> int | None:
        """Returns the exit code with which all agreed to stop."""
        return self._agreement.code

    def report_failure(self, text: str, code: int) -> None:
        """Tells the peers that this process ends with an error of its own."""
        self._reporting.acquire()
        self._stopping.set()
        for peer in self.peers.values():
            peer.send(failed=text, code=code)
        self._wait_for_others()

    def wait_for_verdict(self) -> None:
        """Returns if no peer is found lost within `deadlines.peer_seconds`; otherwise the process ends meanwhile."""
        if self.peers and self._verdict.wait(self.deadlines.peer_seconds * (1 + 1 / _HEARTBEATS)):
            time.sleep(2 * GRACE_SECONDS)

    def stop(self) -> None:
        """Leaves the job: whatever this process does from now on is no failure."""
        for peer in self.peers.values():
            peer.send(leaving=True)
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        """Runs the thread. An error in it ends the process, which might wait forever without a watchdog."""
        ended_well = False
        try:
            self._watch()
            ended_well = True
        finally:
            if not ended_well:
                _print(traceback.format_exc())
                end_now(FAILED)

    def _watch(self) -> None:
        last_look = next_heartbeat = time.monotonic()
        while not self._stopping.is_set():
            for key, _ in self._ready.select(min(0.25, self._heartbeat_seconds)):
                self._receive(key.data)
            now = time.monotonic()
            if now - last_look > self.deadlines.peer_seconds / 2:
                self._restart_clocks(now)
            last_look = now
            if now >= next_heartbeat:
                next_heartbeat = now + self._heartbeat_seconds
                ago = None if self._step_began is None else round(now - self._step_began, 1)
                for peer in self.peers.values():
                    peer.send(step=self._step, ago=ago)
                self._check_peers(now)

    def _restart_clocks(self, now: float) -> None:
        """Ignores silences so far, after this process itself was suspended, with its job or its machine."""
        for peer in self.peers.values():
            peer.last_heard = now
        if self._step_began is not None:
            self._step_began = now

    def _receive(self, peer: Peer) -> None:
        messages = peer.receive()
        if messages is None:
            self._ready.unregister(peer.connection)
            left, peer.left = peer.left, True
            self._agreement.peer_left()
            if not left and not self._stopping.is_set():
                self._report_lost(peer, "its connection has closed without a message; it was killed, or has crashed")
            return
        for message in messages:
            if "leaving" in message:
                peer.left = True
                self._agreement.peer_left()
            elif "verdict" in message:
                self._conclude(**message["verdict"])
            elif "failed" in message:
                peer.left = True
                self._decide(f"{peer} failed: {message['failed']}", message["code"], peer.index, GRACE_SECONDS)
            elif "gather" in message:
                with self._arrived:
                    self._gathered.setdefault(message["gather"], {})[peer.index] = message["value"]
                    self._arrived.notify_all()
            elif message.keys() & {"calls", "asked", "stop_at"}:
                self._agreement.receive(peer, message)
            elif "step" in message:
                ago = message["ago"]
                peer.step, peer.step_began = message["step"], None if ago is None else time.monotonic() - ago

    def _check_peers(self, now: float) -> None:
        """Looks for peers that have fallen silent and, on process 0, for processes that are stuck."""
        for peer in self.peers.values():
            silence = now - peer.last_heard
            if not peer.left and silence > self.deadlines.peer_seconds:
                self._report_lost(
                    peer,
                    f"it has sent nothing for {silence:.0f} s, so it, its machine or the network to it is down "
                    "(deadlines.peer_seconds)",
                )
        if self.index == 0:
            self._check_steps(now)

    def _check_steps(self, now: float) -> None:
        steps = {self.index: self._step} | {index: peer.step for index, peer in self.peers.items()}
        names = {self.index: f"process {self.index}"} | {index: str(peer) for index, peer in self.peers.items()}
        clocks = [self._step_began, *(peer.step_began for peer in self.peers.values())]
        running = [began for began in clocks if began is not None]
        if len(running) < len(clocks) or now - max(running) <= self.deadlines.step_seconds:
            return
        last = max(steps.values())
        behind = [index for index, step in steps.items() if step < last]
        named = [f"{names[index]} did not get past step {steps[index]}" for index in behind[:_MOST_NAMED]]
        more = [f"nor did {len(behind) - _MOST_NAMED} more"] if len(behind) > _MOST_NAMED else []
        self._decide(
            f"no process has made progress for {now - max(running):.0f} s, since step {last} began; "
            + "".join(f"{text}; " for text in named + more)
            + "above is what every thread was doing (deadlines.step_seconds)",
            FAILED, behind[0] if behind else None, grace=0.0, stuck=True,
        )  # fmt: skip

    def _report_lost(self, peer: Peer, why: str) -> None:
        self._decide(f"{peer} was lost: {why}", FAILED, peer.index, grace=0.0)

    def _end_all(self, code: int) -> None:
        self._decide("a process was asked to stop; there was nothing to save", code, None, grace=0.0)

    def _decide(self, text: str, code: int, blamed: int | None, grace: float, stuck: bool = False) -> None:
        """Sends the verdict to the peers that are left, from process 0 all others, and ends this process."""
        verdict: dict[str, Any] = {"text": text, "code": code, "blamed": blamed, "grace": grace, "stuck": stuck}
        for peer in self.peers.values():
            if not peer.left:
                peer.send(verdict=verdict)
        self._conclude(**verdict)

    def _conclude(self, text: str, code: int, blamed: int | None, grace: float, stuck: bool) -> None:
        """Ends this process.

        Args:
          text: the reason, for people.
          code: the exit code.
          blamed: the process at fault; None: several, or unknown.
          grace: seconds in which the main thread may still end the process by itself.
          stuck: print what every thread is doing.
        """
        self._verdict.set()
        if self._stopping.wait(grace) or not self._reporting.acquire(blocking=False):
            return
        if stuck:
            with contextlib.suppress(OSError):
                faulthandler.dump_traceback(2, all_threads=True)
        _print(f"{_ENDINGS.get(code, 'error')}: {text}")
        if blamed is not None:
            Blame(blamed, text).report()
        self._stopping.set()
        self._wait_for_others()
        end_now(code)

    def _wait_for_others(self) -> None:
        """Waits, on process 0, until the others have ended: jax's service ends with it, and jax then aborts them."""
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


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # as in `end_now`: the process must end all the same
        print(printable_lines(text), file=sys.stderr, flush=True)

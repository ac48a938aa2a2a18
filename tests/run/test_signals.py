"""SIGTERM: noticed inside the loop, left alone outside it, agreed upon by the processes of a job."""

import os
import signal
import socket
import subprocess
import sys
import textwrap

from vit_dist.run.signals import StopRequest


def test_sigterm_is_noticed_and_the_handler_restored():
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("outer"))
    try:
        with StopRequest() as stop:
            assert stop.requested(1) is False
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested(2) is True
            assert stop.requested(3) is True
        assert seen == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["outer"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_handler_is_restored_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with StopRequest():
            raise KeyError("x")
    except KeyError:
        pass
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_processes_stop_at_one_step_when_one_is_asked():
    script = """
        import os, signal, sys, time
        import jax
        address, rank = sys.argv[1], int(sys.argv[2])
        jax.distributed.initialize(address, 2, rank)
        from vit_dist.run.signals import StopRequest
        with StopRequest() as stop:
            for step in range(1, 2000):
                if rank == 1 and step == 5:
                    os.kill(os.getpid(), signal.SIGTERM)
                if stop.requested(step):
                    print(step, flush=True)
                    break
                time.sleep(0.01)
        jax.distributed.shutdown()
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", textwrap.dedent(script), address]
    processes = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        steps = [int(process.communicate(timeout=60)[0].splitlines()[-1]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert steps[0] == steps[1] < 1999

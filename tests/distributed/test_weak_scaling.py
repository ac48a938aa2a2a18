"""Weak scaling: with more processes, and the same rows on each device, a device sends hardly more in a step."""

import contextlib
import sys
from pathlib import Path

import pytest
from system import started

from vit_dist.job.launcher import free_port

SCRIPT = Path(__file__).with_name("scaling.py")
PARAMETERS = 18_154  # of tiny.py


def step_of(folder, count):
    """Returns what `scaling.py` prints on `count` processes of two devices each."""
    variables = {"VIT_DIST_COORDINATOR": f"127.0.0.1:{free_port()}", "VIT_DIST_PROCESSES": str(count)}
    with contextlib.ExitStack() as open_:
        running = [
            open_.enter_context(
                started([sys.executable, str(SCRIPT)], folder / f"{count}-{i}", VIT_DIST_PROCESS=str(i), **variables)
            )
            for i in range(count)
        ]
        assert [process.wait() for process in running] == [0] * count, [process.said()[-2000:] for process in running]
        step = running[0].result()
    assert (step["processes"], step["devices"]) == (count, 2 * count)
    return step


def reduced(step):
    """Returns the bytes that a step's all-reduces sum over all devices; no other collective, and none in a loop."""
    kinds = {(collective["kind"], tuple(collective["axes"]), collective["loops"]) for collective in step["collectives"]}
    assert kinds == {("all-reduce", ("data",), 0)}
    return sum(collective["bytes"] for collective in step["collectives"])


@pytest.mark.slow
def test_what_a_device_sends_grows_only_as_a_ring_of_more_devices_does(tmp_path, record_property):
    steps = [step_of(tmp_path, count) for count in (1, 2, 4)]
    payloads = [reduced(step) for step in steps]
    # A ring all-reduce over n devices sends each byte 2 (n - 1) / n times.
    sent = [
        payload * 2 * (step["devices"] - 1) / step["devices"] for payload, step in zip(payloads, steps, strict=True)
    ]
    record_property("bytes_sent", sent)
    print(f"bytes reduced a step: {payloads}; bytes that a device sends by a ring: {[round(size) for size in sent]}")
    assert payloads[0] == payloads[1] == payloads[2]
    assert payloads[0] == pytest.approx(4 * PARAMETERS, rel=0.01)  # float32 gradients, once, and a few scalars

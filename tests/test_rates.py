"""Time lost to data is measured, and the stage to blame is named."""

import contextlib
import dataclasses
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from vit_dist import rates
from vit_dist.config import Data
from vit_dist.data.sets.examples import FileSource
from vit_dist.data.sets.index import Names
from vit_dist.data.stream import pixels
from vit_dist.data.stream.loader import Batches, train_batches
from vit_dist.data.stream.timings import Timings
from vit_dist.mesh import feed


@pytest.fixture
def judged_at_once(monkeypatch):
    """Stretches of any length are judged."""
    monkeypatch.setattr(rates, "MIN_CHECK_S", 0.0)


RAW = b"P6 8 8 255\n" + bytes(8 * 8 * 3)


@dataclasses.dataclass
class Slow:
    """Images that take their time to be read."""

    seconds: float

    def read(self, index):
        time.sleep(self.seconds)
        return RAW


def source(seconds):
    labels = np.zeros(64, np.int32)
    return FileSource("set", Names.of(str(i) for i in range(64)), labels, ("one",), Slow(seconds))


@contextlib.contextmanager
def stream(seconds):
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:1])
    options = {"image_size": (8, 8), "channels": 3, "seed": 0, "batch_size": 16, "rows": range(16)}
    data = Data(threads=2, read_ahead_mb=0.01)
    host = train_batches(source(seconds), data, start_step=0, stop_step=1000, **options)
    placed = feed.Prefetch(host, mesh, 16, 1)
    with contextlib.closing(host), contextlib.closing(placed):
        yield host, placed


def measured(seconds, step_seconds, steps=8):
    with stream(seconds) as (host, placed):
        next(placed)
        window = rates.Window(0, host, placed)
        for _ in range(steps):
            next(placed)
            time.sleep(step_seconds)
        found = window.rates(steps)
        window.warn_of_slow_data(found, steps)
        return found


def test_a_slow_disk_is_named_with_the_time_it_costs(judged_at_once, caplog):
    found = measured(seconds=0.004, step_seconds=0.005)
    assert found.waited > 0.5 * found.seconds  # 16 reads of 4 ms on two threads make 32 ms a batch
    assert found.data.read > 8 * 16 * 0.004 * 0.9
    (record,) = [one for one in caplog.records if "waiting for data" in one.message]
    assert "the slowest stage is read" in record.message and "2 threads or processes share" in record.message
    assert int(record.message.split("%")[0].split()[-1]) == round(100 * found.waited / found.seconds)


def test_a_slow_decoder_is_told_from_a_slow_disk(judged_at_once, caplog, monkeypatch):
    decode_box = pixels.images.decode_box

    def slow(*arguments):
        time.sleep(0.003)
        return decode_box(*arguments)

    monkeypatch.setattr(pixels.images, "decode_box", slow)
    measured(seconds=0.0005, step_seconds=0.001)
    assert "the slowest stage is decode" in caplog.text


def test_a_step_that_is_slower_than_its_data_says_nothing(judged_at_once, caplog):
    with stream(0.0) as (host, placed):
        next(placed)
        window = rates.Window(0, host, placed)
        for _ in range(8):
            time.sleep(0.05)
            while not placed._ready.full():  # however busy the machine is
                time.sleep(0.005)
            next(placed)
        found = window.rates(8)
        window.warn_of_slow_data(found, 8)
    assert found.waited < rates.SLOW_DATA * found.seconds
    assert "waiting for data" not in caplog.text


def test_a_stretch_is_judged_with_those_before_it_once_they_are_ten_seconds(caplog):
    def said(*waited):
        """After stretches of 4 s, of which so many were spent waiting."""
        caplog.clear()
        with stream(0.0) as (host, placed):
            window = rates.Window(0, host, placed)
            for step, seconds in enumerate(waited, 1):
                window.warn_of_slow_data(rates.Rates(4.0, 10, seconds, Timings(read=2.0)), 10 * step)
        return [record.message.partition(" of the time")[0] for record in caplog.records]

    assert said(4.0, 4.0) == []  # too short to say
    assert said(1.0, 0.0, 0.0) == ["step 30: 8 %"]
    assert said(0.3, 0.1, 0.1) == []  # one window of 7 % in a stretch of 4 %
    assert said(0.3, 0.1, 0.1, 3.0, 0.0, 0.0) == ["step 60: 25 %"]


def test_it_is_said_once_a_minute_at_most(judged_at_once, caplog):
    with stream(0.004) as (host, placed):
        next(placed)
        window = rates.Window(0, host, placed)
        for step in range(1, 7):
            next(placed)
            window.warn_of_slow_data(window.rates(step), step)
    assert caplog.text.count("waiting for data") == 1


@pytest.mark.parametrize(
    ("stages", "parallel", "slowest"),
    [
        (Timings(read=1, decode=5, augment=2, copy=0.1), 4, "decode"),
        (Timings(read=6, decode=5, augment=2, copy=0.1), 4, "read"),
        (Timings(read=1, decode=2, augment=3, copy=1.4), 4, "augment"),
        (Timings(read=1, decode=2, augment=3, copy=1.6), 4, "copy"),  # done by one thread while four share the rest
    ],
)
def test_the_slowest_stage_is_that_which_a_batch_waits_for(stages, parallel, slowest):
    assert stages.slowest(parallel) == slowest


def test_windows_do_not_overlap():
    with stream(0.001) as (host, placed):
        assert isinstance(host, Batches)
        next(placed)
        window = rates.Window(0, host, placed)
        for _ in range(4):
            next(placed)
        first = window.rates(4)
        assert window.rates(4) is None
        for _ in range(4):
            next(placed)
        second = window.rates(8)
        read, waited = host.timings.read, placed.waited
    assert first.steps == second.steps == 4
    assert min(first.data.read, second.data.read, first.data.copy, first.waited, second.waited) > 0
    assert first.data.read + second.data.read <= read and first.waited + second.waited <= waited

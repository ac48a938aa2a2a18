"""Progress: plain lines in a file, a bar on a terminal."""

import io
import re

import pytest

from vit_dist.run import progress
from vit_dist.run.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_stream_that_is_no_terminal_gets_plain_lines(clock):
    stream = io.StringIO()
    shown = Progress(500, 0, stream=stream)
    clock[0] = 20.0  # compilation, most of it
    shown.update(20, {"loss": 2.301})
    clock[0] = 25.0
    shown.update(50)
    clock[0] = 30.0
    shown.update(120, {"loss": 1.9312, "learning_rate": 8.1e-4, "images_per_second": 4311.7})
    shown.line("evaluated [test]: 0.93")
    shown.close()
    assert stream.getvalue().splitlines() == [
        "step 20/500  loss 2.301  eta 8:00",
        "step 120/500  loss 1.931  lr 8.1e-4  4,312 img/s  eta 0:38",
        "evaluated [test]: 0.93",
    ]


def test_a_resumed_run_counts_its_own_steps_only(clock):
    stream = io.StringIO()
    shown = Progress(500, 400, stream=stream)
    clock[0] = 10.0
    shown.update(410, "loss 1")
    assert stream.getvalue() == "step 410/500  loss 1  eta 1:30\n"


def test_long_lines_stay_in_one_piece():
    stream = io.StringIO()
    Progress(10, stream=stream).line("x" * 300)
    assert stream.getvalue() == "x" * 300 + "\n"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    shown = Progress(500, 0, stream=stream)
    shown.update(120, {"loss": 1.93})
    print("a result")
    shown.line("evaluated [test]")
    shown.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "step 120/500 ━━" in text
    assert "loss 1.93  eta 0:0" in text
    assert "evaluated [test]" in text
    assert capsys.readouterr().out == "a result\n"  # stdout is not the bar's


def test_durations_read_as_clocks():
    assert [duration(s) for s in (0.2, 41, 725, 3600, 10859)] == ["0:00", "0:41", "12:05", "1:00:00", "3:00:59"]

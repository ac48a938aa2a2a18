"""Progress: plain lines in a file, a bar on a terminal with log lines above it."""

import io
import logging
import re
import sys

import pytest
from terminal import screen_of

from vit_dist.run import progress
from vit_dist.run.progress import Progress, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, in a list, which the test sets."""
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


LOGS = """
import logging, sys
from absl import flags, logging as absl_logging
from vit_dist import cli
from vit_dist.run.progress import Progress

def run(options):
    flags.FLAGS.mark_as_parsed()  # absl prints a warning otherwise
    absl = logging.getLogger("absl")
    absl.addHandler(absl_logging.get_absl_handler())
    absl.propagate = False
    log = logging.getLogger("vit_dist.train")
    log.info("before the bar")
    progress = Progress(9)
    progress.update(1, {"loss": 2.5})
    log.info("first step: %.1f s", 0.5)
    absl_logging.warning("from absl")
    log.warning("two\\nlines")
    progress.update(2, {"loss": 1.5})
    print("printed", file=sys.stderr)
    progress.line("test at step 2")
    progress.close()
    log.info("after the bar")

cli._VERBS["configs"] = run
sys.argv = ["vit-dist", "configs"]
sys.exit(cli.main())
"""


def test_every_log_line_stands_by_itself_above_the_bar_of_a_terminal():
    lines = screen_of(LOGS)
    bar = [line for line in lines if "━" in line]
    assert len(bar) == 1 and re.fullmatch(r"step 2/9 [━╺╸]+ loss 1.5  eta 0:\d\d", bar[0])
    lines = [re.sub(r"^W\d{4} .*\] ", "absl: ", line) for line in lines if line not in bar]
    assert lines == [
        "before the bar", "first step: 0.5 s", "absl: from absl", "two", "    lines", "printed", "test at step 2",
        "after the bar",
    ]  # fmt: skip


def test_a_plain_stream_leaves_log_handlers_alone(capsys):
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("vit_dist").addHandler(handler)
    try:
        shown = Progress(9)
        assert handler.stream is sys.stderr
        shown.close()
    finally:
        logging.getLogger("vit_dist").removeHandler(handler)


def test_durations_read_as_clocks():
    assert [duration(s) for s in (0.2, 41, 725, 3600, 10859)] == ["0:00", "0:41", "12:05", "1:00:00", "3:00:59"]

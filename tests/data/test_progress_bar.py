"""The progress bar of long work on data."""

import io
import sys
from typing import Any

from terminal import screen_of

from vit_dist.data.progress_bar import counted

LOGS = """
import logging, sys
from vit_dist.data.progress_bar import counted

logging.basicConfig(format="%(message)s", level="INFO")
stderr = sys.stderr
for number in counted(range(3), "reading"):
    logging.info("image %d %s", number, "x" * 120)
    print("printed", number, file=sys.stderr)
assert logging.root.handlers[0].stream is sys.stderr is stderr
logging.info("after the bar")
"""


def test_every_log_line_stands_by_itself_and_the_bar_disappears() -> None:
    lines = [line for number in range(3) for line in (f"image {number} {'x' * 120}", f"printed {number}")]
    assert screen_of(LOGS) == [*lines, "after the bar"]


def test_nothing_is_shown_if_stderr_is_no_terminal(monkeypatch: Any) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(counted(iter("abc"), "reading", 3)) == ["a", "b", "c"]
    assert stream.getvalue() == ""

"""How far a run is, for whoever watches it: a bar on a terminal, plain lines everywhere else.

Both go to stderr, so that stdout carries results and nothing besides.
"""

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

Values = Mapping[str, float | int | str]


class Progress:
    """Steps done out of `total_steps`, the last values seen, and the time left."""

    def __init__(self, total_steps: int, start_step: int = 0, *, stream: TextIO | None = None):
        """`stream` is stderr unless given; it gets the bar if it is a terminal."""
        self._total = total_steps
        self._begun_at = (start_step, time.monotonic())
        self._first_done: tuple[int, float] | None = None
        self._console = Console(file=stream or sys.stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self._bar = None
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("step {task.completed}/{task.total}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}", markup=False),
                console=self._console,
                refresh_per_second=4,
                redirect_stdout=False,  # what is printed there is a result, and may go to a file
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, text="")
            self._bar.start()

    def update(self, step: int, values: Values | str | None = None) -> None:
        """`step` steps are done. Values are shown; without any, the bar moves and a plain stream stays quiet."""
        now = time.monotonic()
        shown = values if isinstance(values, str) else "  ".join(_say(*item) for item in (values or {}).items())
        text = "  ".join(part for part in (shown, self._eta(step, now)) if part)
        self._first_done = self._first_done or (step, now)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            if values:
                self._bar.update(self._task, text=text)
        elif values:
            self.line(f"step {step}/{self._total}  {text}")

    def line(self, text: str) -> None:
        """One line of its own, above the bar where there is one."""
        self._console.print(text)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()

    def _eta(self, step: int, now: float) -> str:
        """Time left at the mean rate since the first update: what came before it holds the compilation."""
        first_step, first_time = self._first_done or self._begun_at
        if step <= first_step:
            return ""
        seconds = (now - first_time) / (step - first_step) * (self._total - step)
        return f"eta {duration(seconds)}"


def duration(seconds: float) -> str:
    """`0:41`, `12:05` or `3:00:59`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _say(name: str, value: float | int | str) -> str:
    """`loss 1.93`, `lr 8.1e-4`, `4,312 img/s`."""
    if name == "images_per_second":
        return f"{value:,.0f} img/s"
    if name == "learning_rate":
        return f"lr {value:.1e}".replace("e-0", "e-").replace("e+00", "")
    if isinstance(value, str):
        return f"{name} {value}"
    return f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"

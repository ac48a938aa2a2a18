"""How far a run is: a progress bar on a terminal, plain lines everywhere else.

Both go to stderr, so that stdout carries results only. While the bar is shown, everything else that Python writes to
stderr, log records included, is printed above it line by line.
"""

import time
from collections.abc import Mapping
from typing import TextIO

from rich.progress import BarColumn, TextColumn

from vit_dist.data.progress_bar import Bar
from vit_dist.escape import printable

Values = Mapping[str, float | int | str]


class Progress:
    """Shows the steps done out of `total_steps`, the latest values, and the time left."""

    def __init__(self, total_steps: int, start_step: int = 0, *, stream: TextIO | None = None):
        """Shows the bar if `stream` (None: stderr) is a terminal."""
        self._total = total_steps
        self._started = (start_step, time.monotonic())
        self._first_update: tuple[int, float] | None = None
        text = TextColumn("{task.fields[text]}", markup=False)
        steps = TextColumn("step {task.completed}/{task.total}", markup=False)
        self._bar = Bar(steps, BarColumn(bar_width=20), text, stream=stream, refresh_per_second=4)
        self._task = self._bar.add_task("", total=total_steps, completed=start_step, text="")
        self._bar.start()

    def update(self, step: int, values: Values | str | None = None) -> None:
        """Shows that `step` steps are done, with these values; without values a plain stream gets no line."""
        now = time.monotonic()
        shown = values if isinstance(values, str) else "  ".join(_format(*item) for item in (values or {}).items())
        text = "  ".join(filter(None, (shown, self._eta(step, now))))
        self._first_update = self._first_update or (step, now)
        if not self._bar.disable:
            self._bar.update(self._task, completed=step)
            if values:
                self._bar.update(self._task, text=text)
        elif values:
            self.line(f"step {step}/{self._total}  {text}")

    def line(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._bar.console.print(printable(text))

    def close(self) -> None:
        """Stops the bar, and leaves it on the screen as it is."""
        self._bar.stop()

    def _eta(self, step: int, now: float) -> str:
        """Returns the time left at the mean rate since the first update; the time before it includes compilation."""
        first_step, first_time = self._first_update or self._started
        if step <= first_step:
            return ""
        seconds = (now - first_time) / (step - first_step) * (self._total - step)
        return f"eta {duration(seconds)}"


def duration(seconds: float) -> str:
    """Returns `0:41`, `12:05` or `3:00:59`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _format(name: str, value: float | int | str) -> str:
    """Returns `loss 1.93`, `lr 8.1e-4` or `4,312 img/s`."""
    if name == "images_per_second":
        return f"{value:,.0f} img/s"
    if name == "learning_rate":
        return f"lr {value:.1e}".replace("e-0", "e-").replace("e+00", "")
    if isinstance(value, str):
        return f"{name} {value}"
    return f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4g}"

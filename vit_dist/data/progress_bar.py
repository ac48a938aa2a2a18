"""Shows the progress of long work: a bar on stderr if that is a terminal, with log records above it."""

import logging
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from vit_dist.escape import printable

T = TypeVar("T")


class Bar(Progress):
    """A bar of rich. While it is shown, all that Python writes to stderr is printed above it, line by line.

    rich replaces `sys.stderr` by a stream that does so. A log handler keeps the stream that it was made with, so its
    records would end up in the bar's own line; this class gives the handlers of stderr that stream too.
    """

    def __init__(self, *columns: ProgressColumn, stream: TextIO | None = None, **options: Any) -> None:
        """Hides the bar if `stream` (None: stderr) is not a terminal. `options` are those of rich's `Progress`."""
        console = Console(file=stream or sys.stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
        # Results are printed on stdout, and may go to a file.
        super().__init__(*columns, console=console, disable=not console.is_terminal, redirect_stdout=False, **options)

    def add_task(self, description: str, *arguments: Any, **options: Any) -> TaskID:
        return super().add_task(printable(description), *arguments, **options)

    def start(self) -> None:
        self._stderr, self._handlers = sys.stderr, [] if self.disable else _handlers_of(sys.stderr)
        super().start()
        for handler in self._handlers:
            handler.setStream(sys.stderr)

    def stop(self) -> None:
        super().stop()
        for handler in self._handlers:
            handler.setStream(self._stderr)


def _handlers_of(stream: TextIO) -> list[logging.StreamHandler]:
    """Returns the logging handlers that write to `stream`, at any logger."""
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    writers = [getattr(handler, "python_handler", handler) for handler in handlers]  # absl's handler contains another
    return [writer for writer in writers if isinstance(writer, logging.StreamHandler) and writer.stream is stream]


def bar() -> Bar:
    """Returns a bar to use as a context manager, with `add_task` and `advance`. It disappears at the end."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Bar(*columns, transient=True)


def counted(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yields the items and advances a bar of this title with each. `total` defaults to the length of `items`."""
    with bar() as progress:
        yield from progress.track(items, total=total, description=title)

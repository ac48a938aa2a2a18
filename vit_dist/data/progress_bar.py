"""Shows the progress of long work on data: a bar on stderr if that is a terminal, otherwise nothing."""

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def bar() -> Progress:
    """Returns a bar to use as a context manager, with `add_task` and `advance`. Hidden if stderr is no terminal."""
    console = Console(file=sys.stderr, highlight=False, markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False)


def counted(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yields the items and advances a bar of this title with each. `total` defaults to the length of `items`."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar() as progress:
        yield from progress.track(items, total=total, description=title)

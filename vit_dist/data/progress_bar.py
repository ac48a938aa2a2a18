"""How far a long piece of work on data is: a bar on a terminal, nothing elsewhere; both on stderr."""

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def bar() -> Progress:
    """A bar to be used as a context, for `add_task` and `advance`; it stays away where stderr is no terminal."""
    console = Console(file=sys.stderr, highlight=False, markup=False)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal, redirect_stdout=False)


def counted(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """The items, shown as they pass."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar() as shown:
        yield from shown.track(items, total=total, description=title)

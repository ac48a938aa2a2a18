"""Prints the result of a verb on stdout, JSON or a table, and messages on stderr; nothing that a terminal would obey.

Of the processes of a job, the first one prints results, and each its messages.
"""

import json
import sys
import traceback
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from vit_dist.escape import printable, printable_lines


def print_json(value: Any) -> None:
    if _first_process():
        print(json.dumps(value).replace("\x7f", r"\u007f"), flush=True)  # json escapes all else


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns as wide as their contents, so that other tools can cut and search the lines."""
    if not _first_process():
        return
    lines = [tuple(map(printable, row)) for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_lines(lines: Iterable[str]) -> None:
    """Prints lines of a result."""
    if _first_process():
        for line in lines:
            print(printable(line))


def print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints an error that nobody expected, as `sys.excepthook` does."""
    print_message("".join(traceback.format_exception(kind, error, trace)).rstrip())


def print_message(text: str) -> None:
    """Prints a message on stderr, such as `error: ...`."""
    print(printable_lines(text), file=sys.stderr)


def _first_process() -> bool:
    if "jax" not in sys.modules:
        return True
    from vit_dist.job import processes

    return processes.index() == 0

"""Prints the result of a verb on stdout: JSON, or a table. Of the processes of a job, the first one prints."""

import json
import sys
from collections.abc import Sequence
from typing import Any


def print_json(value: Any) -> None:
    if _first_process():
        print(json.dumps(value), flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns as wide as their contents, so that other tools can cut and search the lines."""
    if not _first_process():
        return
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _first_process() -> bool:
    if "jax" not in sys.modules:
        return True
    from vit_dist.job import processes

    return processes.index() == 0

"""Writes predictions to a file as they come: CSV, JSON lines or Parquet, by its suffix.

A file that did not decode keeps its place: its row has the reason as `error`, and no classes.
"""

import csv
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from vit_dist.config import ConfigError
from vit_dist.data.files import replacing
from vit_dist.escape import printable
from vit_dist.paths import expanded

_ROWS = 4096  # of a row group of Parquet


def check_out(out: str | Path) -> Path:
    """Returns the path. Raises `ConfigError` if its suffix is not known, it exists or its folder does not."""
    path = expanded(out, "out")
    if path.suffix.lower() not in WRITERS:
        raise ConfigError(f"out: {path}: expected a name that ends in {', '.join(WRITERS)}")
    if os.path.lexists(path):
        raise ConfigError(f"out: {path}: exists; remove it or give another name")
    if not path.parent.is_dir():
        raise ConfigError(f"out: {path}: there is no folder {path.parent}; make it first")
    return path


def write(out: Path, predictions: Iterator[Mapping[str, Any]]) -> None:
    """Writes predictions, as `predict` returns them, to a file that appears when all are in it.

    The rows of CSV and Parquet have `file`, `class_1`, `probability_1` and so on for as many classes as a prediction
    has, and `error`; those of JSON lines are the predictions themselves.

    Args:
      out: the file, as `check_out` returns it.
      predictions: the predictions, which have equally many classes, but for those with an error.
    """
    with replacing(out) as stream:
        WRITERS[out.suffix.lower()](stream, predictions)


def table_rows(prediction: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Returns the lines of a prediction in a table: file, class and probability; the file in the first line only."""
    file = printable(prediction["file"])
    if "error" in prediction:
        return [(file, f"({prediction['error']})", "")]
    lines = [(choice["name"], f"{choice['probability']:.1%}") for choice in prediction["classes"]] or [("", "")]
    return [(file if rank == 0 else "", *line) for rank, line in enumerate(lines)]


def _write_csv(stream: IO[bytes], predictions: Iterator[Mapping[str, Any]]) -> None:
    columns, predictions = _columns(predictions)
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", newline="", write_through=True)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    for prediction in predictions:
        writer.writerow(_row(prediction))
    text.detach()


def _write_json_lines(stream: IO[bytes], predictions: Iterator[Mapping[str, Any]]) -> None:
    for prediction in predictions:
        stream.write(json.dumps(prediction).encode() + b"\n")


def _write_parquet(stream: IO[bytes], predictions: Iterator[Mapping[str, Any]]) -> None:
    columns, predictions = _columns(predictions)
    schema = pyarrow.schema(columns)
    with pyarrow.parquet.ParquetWriter(stream, schema) as writer:
        for rows in _chunks(map(_row, predictions)):
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _columns(predictions: Iterator[Mapping[str, Any]]) -> tuple[dict[str, Any], Iterator[Mapping[str, Any]]]:
    """Returns name -> type of the columns, which the first prediction without an error shows; and all predictions."""
    seen: list[Mapping[str, Any]] = []
    for prediction in predictions:
        seen.append(prediction)
        if "error" not in prediction:
            break
    columns = {"file": pyarrow.string()}
    for rank in range(1, len(seen[-1].get("classes", ())) + 1):
        columns |= {f"class_{rank}": pyarrow.string(), f"probability_{rank}": pyarrow.float64()}
    return {**columns, "error": pyarrow.string()}, itertools.chain(seen, predictions)


def _row(prediction: Mapping[str, Any]) -> dict[str, Any]:
    row = {"file": printable(prediction["file"]), "error": prediction.get("error")}
    for rank, choice in enumerate(prediction.get("classes", ()), 1):
        row |= {f"class_{rank}": choice["name"], f"probability_{rank}": choice["probability"]}
    return row


def _chunks(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == _ROWS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


Writer = Callable[[IO[bytes], Iterator[Mapping[str, Any]]], None]
WRITERS: dict[str, Writer] = {".csv": _write_csv, ".jsonl": _write_json_lines, ".parquet": _write_parquet}

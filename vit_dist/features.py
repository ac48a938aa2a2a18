"""Writes the features of every example of a split into one file, Parquet or npz.

The rows are made a part at a time, in a folder beside the file, so that an extraction that was stopped goes on after
its last whole part. The folder holds a plan of what it belongs to; parts of another model, of other data or of another
kind of features are not continued. At the end the parts are joined to the file, and the folder is removed.
"""

import dataclasses
import itertools
import json
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np
import pyarrow
import pyarrow.parquet

from vit_dist.config import Config, ConfigError
from vit_dist.data.files import first_line, location, remove_partial, replacing
from vit_dist.data.progress_bar import bar
from vit_dist.data.sets.examples import Source, distinct_names, fingerprint
from vit_dist.data.sets.recognise import recognise
from vit_dist.data.sets.sources import open_source
from vit_dist.data.stream.bad_examples import TooManyBadExamples
from vit_dist.extraction import Extractor, Rows
from vit_dist.job import processes
from vit_dist.load import base, opened, set_keys, start_devices
from vit_dist.paths import expanded
from vit_dist.program import make_mesh
from vit_dist.recipes import Overrides
from vit_dist.run.checkpoints import Step
from vit_dist.run.files import COUNT, read_json, write_atomically
from vit_dist.run.lock import agree, locked
from vit_dist.step.state import Parameters
from vit_dist.weights.traits import PREPARED, TRAITS

PART_BYTES = 1 << 26  # of features in a part, about
_PLAN = "plan.json"
_SUFFIXES = (".parquet", ".npz")

_log = logging.getLogger(__name__)


def features(
    model: str | Path,
    out: str | Path,
    *,
    path: str | Path | None = None,
    split: str = "train",
    what: str = "pooled",
    block: int | None = None,
    step: Step = "newest",
    overrides: Overrides = (),
) -> dict[str, Any]:
    """Writes features of every example of a split, each once, over the mesh that the config asks for.

    Args:
      model: the workdir of a run, or weights, as for `load`.
      out: the file, .parquet or .npz, which must not exist. A row has `id`, `label` and `features`; in Parquet, whose
        row groups are the parts, also `class` and `name` of the example, and in npz there is one array `class_names`.
      path: the data, which are recognised by their files unless `data.source` is set; None: those of the run.
      split: the split.
      what: pooled, cls, mean or tokens; see `extraction.Extractor`.
      block: the number of a block, from 0; None: the last.
      step: which checkpoint of a run.
      overrides: changes of the config. Of a run, those that leave it the same.

    Returns:
      `out`, `split`, `what`, `block`, `count`, `skipped`, and `shape`, that of the features of one example.

    Raises:
      ConfigError: there is no such model, split or block; `out` exists; or the folder of its parts is of another
        extraction.
    """
    out = expanded(out, "OUT")
    start_devices(model, overrides, "features", on_other_data=path is not None)
    agree(_refusal(out))
    chosen = opened(model, overrides, step, "features")
    settings = with_data(chosen.settings, path, overrides, has_own=base(model, "features")[0] is not None)
    source = open_source(settings.data, split, settings.model.channels)
    if not len(source):
        raise ConfigError(f"features: the split {split} holds no examples")
    mesh = make_mesh(settings, jax.devices())
    function, parameters = dataclasses.replace(chosen, settings=settings).place(mesh)
    with jax.set_mesh(mesh):
        extractor = Extractor(settings, function, mesh, what, block)
        plan: dict[str, Any] | None = None
        if processes.index() == 0:
            plan = {
                "weights": chosen.published.origin.digest(),
                "data": fingerprint(source),
                "split": split,
                "examples": len(source),
                "what": what,
                "block": extractor.block,
                "shape": list(extractor.row_shape),
                **_traits(settings),
            }
    parts = _Parts(out, extractor)
    with locked(parts.folder, settings.deadlines.peer_seconds, "OUT"):
        agree(_refusal(out) or parts.begin(plan))
        try:
            with jax.set_mesh(mesh):
                _extract(extractor, parameters, source, parts)
        finally:
            parts.drop_if_empty()
        processes.stop_clock()  # the others wait while process 0 writes, which may take any time
        answer = parts.finish(source, settings.data.max_bad_fraction) if processes.index() == 0 else {}
    count, problem = processes.gather([answer.get("count"), answer.get("problem")])[0]
    if problem:
        raise TooManyBadExamples(problem)
    return {
        "out": str(out),
        "split": split,
        "what": what,
        "block": extractor.block,
        "count": count,
        "skipped": len(source) - count,
        "shape": list(extractor.row_shape),
    }


def with_data(settings: Config, path: str | Path | None, overrides: Overrides, *, has_own: bool) -> Config:
    """Returns the config with the data at `path`, whole and recognised by its files, where overrides say nothing else.

    `has_own` says whether the config has data of its own, as that of a run does and that of weights does not. Raises
    `ConfigError` if there are none at all.
    """
    data, given = settings.data, set_keys(overrides)
    if path is None:
        if not has_own and not {"data.source", "data.path", "data.mixture"}.intersection(given):
            raise ConfigError("data.path: not set; give the folder or file of the data, --data.path=DIR")
        return settings
    text = str(path)
    whole: dict[str, Any] = {"mixture": (), "classes": (), "fraction": 1.0, "name": None, "download": False}
    changed = {key: value for key, value in whole.items() if f"data.{key}" not in given}
    if "data.source" not in given:
        changed["source"] = recognise(location(text, "data.path"), "--config.data.source")
    return dataclasses.replace(settings, data=dataclasses.replace(data, path=text, **changed))


class _Parts:
    """The folder of parts, `OUT.parts`: `plan.json`, and for each range of ids one npz. Process 0 alone touches it."""

    def __init__(self, out: Path, extractor: Extractor):
        self.out, self.folder = out, out.with_name(f"{out.name}.parts")
        row = 4 * math.prod(extractor.row_shape)
        batch = extractor.batch_size
        self.rows = max(1, PART_BYTES // row // batch) * batch  # so that no part ends inside a batch
        self.plan: dict[str, Any] = {}

    def begin(self, plan: dict[str, Any] | None) -> str:
        """Writes the plan, or checks that the folder belongs to it; returns what is wrong, or ""."""
        if plan is None:
            return ""
        self.plan = plan
        remove_partial(self.out.parent, self.out.name)
        if (self.folder / _PLAN).is_file():
            try:
                old = read_json(
                    self.folder / _PLAN, {"rows_of_a_part?": COUNT}, "remove the folder or give another OUT"
                )
            except ConfigError as error:
                return str(error)
            if not self.file(0).exists():  # it was stopped before its first part
                return self._write_plan()
            self.rows = old.pop("rows_of_a_part", None) or self.rows
            different = [key for key in {**old, **plan} if old.get(key) != plan.get(key)]
            if different:
                key = different[0]
                return (
                    f"{self.folder}: holds parts of another extraction ({key} was {old.get(key)!r}, now "
                    f"{plan.get(key)!r}); remove it or give another OUT"
                )
            return ""
        if any(not file.name.startswith(".") for file in self.folder.iterdir()):
            return f"{self.folder}: is no folder of parts ({_PLAN} is missing); remove it or give another OUT"
        return self._write_plan()

    def _write_plan(self) -> str:
        write_atomically(self.folder / _PLAN, json.dumps({**self.plan, "rows_of_a_part": self.rows}, indent=2) + "\n")
        return ""

    def drop_if_empty(self) -> None:
        """Removes the folder where it holds no part yet."""
        if self.plan and not self.file(0).exists():
            shutil.rmtree(self.folder)

    def file(self, number: int) -> Path:
        return self.folder / f"{number:06}.npz"

    def whole(self) -> int:
        """Returns how many parts can be read, from the first on; one that is damaged is made again."""
        number = 0
        while self.file(number).is_file():
            try:
                _read_part(self.file(number))
            except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
                _log.warning("%s: cannot be read (%s); made again", self.file(number), first_line(error))
                return number
            number += 1
        return number

    def write(self, number: int, rows: Rows) -> None:
        with replacing(self.file(number)) as stream:
            np.savez(stream, **rows._asdict())

    def read(self) -> Iterator[Rows]:
        for number in itertools.takewhile(lambda number: self.file(number).is_file(), itertools.count()):
            yield _read_part(self.file(number))

    def finish(self, source: Source, max_bad_fraction: float) -> dict[str, Any]:
        """Joins the parts to the file, and removes them; returns the `count` of rows, or a `problem`."""
        count = sum(len(rows.ids) for rows in self.read())
        skipped = len(source) - count
        if skipped and (skipped > max_bad_fraction * len(source) or not count):
            return {"problem": f"data.max_bad_fraction: {skipped} of {len(source)} files did not decode"}
        with replacing(self.out) as stream:
            write = _write_parquet if self.out.suffix.lower() == ".parquet" else _write_npz
            write(stream, self, source, count)
        shutil.rmtree(self.folder)
        return {"count": count}


def _read_part(file: Path) -> Rows:
    with np.load(file, allow_pickle=False) as arrays:
        return Rows(*(arrays[name] for name in Rows._fields))


def _extract(extractor: Extractor, parameters: Parameters, source: Source, parts: _Parts) -> None:
    """Makes the parts that are missing."""
    number, size = processes.gather([parts.whole(), parts.rows] if processes.index() == 0 else None)[0]
    waiting: list[Rows] = []
    with bar() as progress:
        task = progress.add_task(f"features of {source.split or 'the split'}", total=len(source))
        progress.advance(task, min(number * size, len(source)))
        for rows in extractor.batches(parameters, source, min(number * size, len(source))):
            if processes.index():
                continue
            progress.advance(task, len(rows.ids))
            waiting.append(rows)
            while len(rows.ids) and rows.ids[-1] >= (number + 1) * size - 1:  # all of the part is there
                number, waiting = number + 1, _cut(parts, number, waiting, (number + 1) * size)
        while number * size < len(source) and not processes.index():
            number, waiting = number + 1, _cut(parts, number, waiting, (number + 1) * size)


def _cut(parts: _Parts, number: int, waiting: list[Rows], end: int) -> list[Rows]:
    """Writes the rows with ids below `end` as a part, and returns the rest."""
    empty = Rows(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros((0, *parts.plan["shape"]), np.float32))
    rows = Rows(*(np.concatenate(column) for column in zip(empty, *waiting, strict=True)))
    count = int(np.searchsorted(rows.ids, end))
    parts.write(number, Rows(*(column[:count] for column in rows)))
    return [Rows(*(column[count:] for column in rows))]


def _write_parquet(stream: IO[bytes], parts: _Parts, source: Source, count: int) -> None:
    kind = pyarrow.float32()
    for side in reversed(parts.plan["shape"]):
        kind = pyarrow.list_(kind, side)
    columns = {"id": pyarrow.int64(), "label": pyarrow.int32(), "class": pyarrow.string(), "name": pyarrow.string()}
    schema = pyarrow.schema({**columns, "features": kind}, metadata={"vit_dist": json.dumps(parts.plan)})
    classes = np.array(distinct_names(source.class_names), object)
    with pyarrow.parquet.ParquetWriter(stream, schema, use_dictionary=["class"]) as writer:
        for rows in parts.read():
            values = pyarrow.array(rows.features.reshape(-1))
            for side in reversed(parts.plan["shape"]):
                values = pyarrow.FixedSizeListArray.from_arrays(values, side)
            names = [source.name(index) for index in rows.ids.tolist()]
            table = pyarrow.table([rows.ids, rows.labels, classes[rows.labels], names, values], schema=schema)
            if len(table):
                writer.write_table(table, row_group_size=len(table))


def _write_npz(stream: IO[bytes], parts: _Parts, source: Source, count: int) -> None:
    """Writes the arrays one after the other, so that a part at a time is in memory."""
    shapes = {"id": ("<i8", ()), "label": ("<i4", ()), "features": ("<f4", tuple(parts.plan["shape"]))}
    whole = {"class_names": np.array(distinct_names(source.class_names)), "plan": np.array(json.dumps(parts.plan))}
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in whole.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array)
        for column, (name, (dtype, shape)) in enumerate(shapes.items()):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": dtype, "fortran_order": False, "shape": (count, *shape)}
                np.lib.format.write_array_header_1_0(member, header)
                for rows in parts.read():
                    member.write(np.ascontiguousarray(rows[column], dtype).data)


def _traits(settings: Config) -> dict[str, Any]:
    """Returns what of the config changes the features, as JSON holds it."""
    found = {f"model.{key}": getattr(settings.model, key) for key in (*TRAITS, "variant", "dtype")}
    found |= {f"data.{key}": getattr(settings.data, key) for key in PREPARED}
    return json.loads(json.dumps(found))


def _refusal(out: Path) -> str:
    if out.suffix.lower() not in _SUFFIXES:
        return f"OUT: {out}: expected a name that ends in {' or '.join(_SUFFIXES)}"
    if processes.index():
        return ""
    if os.path.lexists(out):
        return f"OUT: {out}: exists; remove it or give another name"
    return "" if out.parent.is_dir() else f"OUT: {out}: there is no folder {out.parent}; make it first"

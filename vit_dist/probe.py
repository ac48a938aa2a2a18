"""Evaluates the features of a model, or features in files: nearest neighbours, few-shot and full linear classifiers."""

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pyarrow.parquet

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.files import first_line, open_stream
from vit_dist.data.npy import read_member
from vit_dist.data.sets.formats.listing import MOST_CLASSES
from vit_dist.data.sets.sources import open_source
from vit_dist.extraction import Extractor, Rows
from vit_dist.features import with_data
from vit_dist.job import processes
from vit_dist.load import base, opened, set_keys, start_devices
from vit_dist.paths import expanded
from vit_dist.probes.measure import NAMES, Probes, Row, check, measure
from vit_dist.probes.shots import choose
from vit_dist.program import make_mesh
from vit_dist.recipes import Overrides, override
from vit_dist.run.checkpoints import Step
from vit_dist.run.files import TEXT, WHOLE, mismatch
from vit_dist.schema import one_of

_ERRORS = (  # of files that hold something else, or are damaged
    OSError, EOFError, KeyError, TypeError, ValueError, RecursionError, RuntimeError, MemoryError, zipfile.BadZipFile,
    zlib.error, pyarrow.ArrowException,
)  # fmt: skip
_OF_A_FILE = {"data", "split", "examples"}  # in which the plans of two files of features may differ


def probe(
    model: str | Path,
    *,
    path: str | Path | None = None,
    probes: Sequence[str] = NAMES,
    split: str = "test",
    what: str = "pooled",
    block: int | None = None,
    step: Step = "newest",
    overrides: Overrides = (),
) -> dict[str, Any]:
    """Evaluates the features of a run or of weights of others, over the mesh that the config asks for.

    Args:
      model: the workdir of a run (the moving average of its parameters where there is one), or weights, as for `load`.
      path: the data; None: those of the run. See `features`.
      probes: which, of knn, few_shot and linear. They learn from the split train.
      split: the split to classify.
      what: pooled, cls or mean; see `extraction.Extractor`.
      block: the number of a block, from 0; None: the last.
      step: which checkpoint of a run.
      overrides: changes of the config, such as {"probe.k": (10, 20)}. Of a run, those that leave it the same.

    Returns:
      `split`, `count`, and `probes`: by name (knn/20, few_shot/10, linear) a row as `probes.measure.measure` returns,
      where `top1_by_l2` is a dict.

    Raises:
      ConfigError: there is no such model, split or block, or its training examples are too few for these probes.
    """
    _check_names(probes)
    if what == "tokens":
        raise ConfigError("what: tokens are many features for an image; take pooled, cls or mean")
    if split == "train":
        raise ConfigError("split: train is what probes learn from; give another, such as test")
    start_devices(model, overrides, "probe", on_other_data=path is not None)
    chosen = opened(model, overrides, step, "probe")
    settings = with_data(chosen.settings, path, overrides, has_own=base(model, "probe")[0] is not None)
    train, tested = (open_source(settings.data, name, settings.model.channels) for name in ("train", split))
    mesh = make_mesh(settings, jax.devices())
    function, parameters = dataclasses.replace(chosen, settings=settings).place(mesh)
    with jax.set_mesh(mesh):
        probing = Probes(probes, settings.probe, Extractor(settings, function, mesh, what, block), train)
        rows = probing.measure(parameters, {split: tested})
    found = {name.removeprefix(f"{split}/"): row for name, row in rows.items()}
    return _answer(split, settings.probe, found)


def probe_files(
    train: str | Path, tested: str | Path, *, probes: Sequence[str] = NAMES, overrides: Overrides = ()
) -> dict[str, Any]:
    """Evaluates features that `vit-dist features` has written.

    Args:
      train: the file, .npz or .parquet, to learn from.
      tested: the file to classify.
      probes: as for `probe`.
      overrides: changes of the config, of `probe` and `fake_devices` alone.

    Returns:
      As `probe`. `split` is that of the file `tested`.

    Raises:
      ConfigError: a file holds no such features, or they are of another model or other classes than the other's.
    """
    _check_names(probes)
    for key in set_keys(overrides):
        if key != "fake_devices" and key.partition(".")[0] != "probe":
            raise ConfigError(f"{key}: has no effect on features in files; only fake_devices and probe.* can be set")
    settings = config.typed(override(config.to_dict(config.typed({"total_steps": 1})), overrides))
    processes.start(settings.fake_devices, settings.deadlines)
    files = [expanded(file, "features") for file in (train, tested)]
    (plan, classes, rows), (other_plan, other_classes, other_rows) = map(_read, files)
    for key in sorted({*plan, *other_plan} - _OF_A_FILE):
        if plan.get(key) != other_plan.get(key):
            raise ConfigError(
                f"{files[1]}: its {key} is {other_plan.get(key)}, but {plan.get(key)} in {files[0]}; give a pair"
            )
    if all(plan[key] == other_plan[key] for key in _OF_A_FILE):
        raise ConfigError(f"{files[1]}: holds the examples of {files[0]}, from which probes learn; give other ones")
    for label in classes.keys() & other_classes.keys():
        if classes[label] != other_classes[label]:
            raise ConfigError(
                f"{files[1]}: class {label} is {other_classes[label]!r}, but {classes[label]!r} in {files[0]}"
            )
    names = [classes.get(label, "") for label in range(max(classes) + 1)]
    check(probes, settings.probe, rows.labels, names)
    chosen = {count: rows.ids[choose(rows.labels, count, settings.probe.seed)] for count in settings.probe.shots}
    found = measure(probes, settings.probe, rows, chosen, other_rows, jax.devices())
    return _answer(other_plan["split"], settings.probe, found)


def _read(file: Path) -> tuple[dict[str, Any], dict[int, str], Rows]:
    """Returns what `features` wrote into a file: its plan, the names of classes by label, and the rows."""
    read = _read_parquet if file.suffix.lower() == ".parquet" else _read_npz
    try:
        plan, names, rows = read(file)
        _check_rows(rows)
    except _ERRORS as error:
        raise ConfigError(
            f"{file}: holds no features of `vit-dist features` ({first_line(error)}); give its .npz or .parquet"
        ) from error
    if rows.features.ndim != 2 or not len(rows.features):
        raise ConfigError(f"{file}: holds features {list(rows.features.shape)}; expected one vector for each example")
    return plan, names, rows


def _read_parquet(file: Path) -> tuple[dict[str, Any], dict[int, str], Rows]:
    table = pyarrow.parquet.read_table(file, columns=["id", "label", "class", "features"])
    plan = _plan((table.schema.metadata or {})[b"vit_dist"])
    values = table["features"].combine_chunks()
    while values.type.num_fields:  # lists of lists
        values = values.flatten()
    ids, labels, classes = (table[name].to_numpy() for name in ("id", "label", "class"))
    features = values.to_numpy().reshape(len(table), *plan["shape"])
    return plan, dict(zip(labels.tolist(), classes.tolist(), strict=True)), Rows(ids, labels, features)


def _read_npz(file: Path) -> tuple[dict[str, Any], dict[int, str], Rows]:
    with open_stream(file) as stream, zipfile.ZipFile(stream) as archive:
        plan, names = _plan(str(read_member(archive, "plan"))), read_member(archive, "class_names")
        rows = Rows(*(read_member(archive, name) for name in ("id", "label", "features")))
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ValueError(f"class_names is {list(names.shape)} of {names.dtype}")
    if len(rows.labels) and rows.labels.max() >= len(names):
        raise ValueError(f"label {rows.labels.max()}, but there are {len(names)} class names")
    return plan, dict(enumerate(names.tolist())), rows


def _plan(text: str | bytes) -> dict[str, Any]:
    """Returns the plan of an extraction; raises `ValueError` where it lacks what `probe_files` reads."""
    plan = json.loads(text)
    if problem := mismatch(plan, {"data": TEXT, "split": TEXT, "examples": WHOLE, "shape": [WHOLE]}):
        raise ValueError(f"plan: {problem}")
    return plan


def _check_rows(rows: Rows) -> None:
    """Raises `ValueError` for columns of other types, lengths or labels than `features` writes."""
    for name, column, kinds in zip(Rows._fields, rows, ("i", "i", "f"), strict=True):
        if not column.ndim or column.dtype.kind not in kinds or len(column) != len(rows.ids):
            raise ValueError(f"{name} is {list(column.shape)} of {column.dtype}")
        if name != "features" and column.ndim != 1:
            raise ValueError(f"{name} is {list(column.shape)}")
    if len(rows.labels) and not 0 <= rows.labels.min() <= rows.labels.max() < MOST_CLASSES:
        raise ValueError(f"its labels go from {rows.labels.min()} to {rows.labels.max()}")


def _check_names(probes: Sequence[str]) -> None:
    if not probes:
        raise ConfigError(f"probes: none is named; give some of {', '.join(NAMES)}")
    for name in probes:
        one_of("probes", name, NAMES)


def _answer(split: str, settings: config.Probe, rows: dict[str, Row]) -> dict[str, Any]:
    count = next(iter(rows.values()))["count"]
    for row in rows.values():
        if "top1_by_l2" in row:
            row["top1_by_l2"] = {f"{l2:g}": top1 for l2, top1 in zip(settings.l2, row["top1_by_l2"], strict=True)}
    return {"split": split, "count": count, "probes": rows}

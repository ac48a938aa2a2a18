"""The model card: a README.md that says what an exported model is, how it was made, and how it is opened."""

import json
from pathlib import Path
from typing import Any

import jinja2

from vit_dist.config import Data, pair, to_dict
from vit_dist.escape import printable
from vit_dist.load import Opened
from vit_dist.paths import expanded
from vit_dist.run import workdir as run_files
from vit_dist.run.metrics import read_rows
from vit_dist.schema import flatten
from vit_dist.weights.description import Subject
from vit_dist.weights.traits import PREPARED, traits_of

FILE = "README.md"
_SHOWN = ("top1", "top5", "loss", "count")  # of an evaluation
_DATA = ("source", "name", "path", "classes", "fraction")
_RECIPE = (
    "total_steps", "batch_size", "loss", "label_smoothing", "mixup", "cutmix", "ema_decay", "seed",
    "optimizer.name", "optimizer.learning_rate", "optimizer.weight_decay", "optimizer.schedule",
    "optimizer.warmup_steps", "optimizer.layer_decay", "optimizer.clip", "init.freeze", "lora.rank", "lora.alpha",
    "model.drop_path", "model.dropout", "data.crop_area", "data.flip", "data.color_jitter", "data.randaugment_layers",
    "data.three_augment", "data.erase", "data.rotate",
)  # fmt: skip


def facts(name: Path, opened: Opened, subject: Subject, written: Subject, started: dict[str, Any]) -> dict[str, Any]:
    """Returns what the card tells.

    Args:
      name: of the run or the weights, as the user gave it.
      opened: what it names.
      subject: the model.
      written: the equal model that the files hold.
      started: the weights that a run started from; see `initial.record`.
    """
    workdir, settings, classes = expanded(name, "export"), opened.settings, subject.classes
    is_run = run_files.holds_run(workdir)
    step = opened.published.step
    ours, theirs = traits_of(subject.model), traits_of(written.model)
    return {
        "is_run": is_run,
        "name": workdir.name if workdir.exists() else str(name),
        "family": opened.published.description.family,
        "step": step,
        "digest": None if is_run else opened.published.origin.digest(),
        "license": subject.license,
        "started": _started(started),
        "parameters": sum(array.size for array in subject.parameters.values()),
        "model": {key: value for key, value in ours.items() if value not in (None, False, 0, "none")},
        "changed": [f"model.{key}: {ours[key]} as {theirs[key]}" for key in ours if ours[key] != theirs[key]],
        "image": [*pair(subject.model.image_size), subject.model.channels],
        "data": {key: getattr(settings.data, key) for key in PREPARED},
        "outputs": subject.model.num_classes or 0,
        "classes": classes,
        "averaged": is_run and settings.ema_decay > 0,
        "source": _source(settings.data) if is_run else {},
        "recipe": _recipe(settings) if is_run else {},
        "metrics": _metrics(workdir, step) if is_run else [],
        "notes": opened.fitted.notes,
    }


def text(facts: dict[str, Any], format: str, input: str) -> str:
    """Returns the card of a model in a format; `input` is what a program takes."""
    return _TEMPLATES.get_template("card.md.jinja").render(**facts, format=format, input=input)


def _recipe(settings: Any) -> dict[str, Any]:
    values = flatten(to_dict(settings))
    return {key: values[key] for key in _RECIPE if values[key] not in (None, False, 0, "none") or key == "seed"}


def _started(started: dict[str, Any]) -> dict[str, Any]:
    """Returns what is known of the starting weights, by their own name where they were a folder or file."""
    name = str(started.get("name", ""))
    local = name.startswith(("/", "~", ".")) or Path(name).exists()
    return started | {"name": Path(name).name} if local and name else started


def _source(data: Data) -> dict[str, Any]:
    """Returns what the data of a run are, without the folders of this machine."""
    found = {key: value for key in _DATA if (value := getattr(data, key))}
    return found | ({"path": Path(found["path"]).name} if "path" in found else {})


def _metrics(workdir: Path, step: int | None) -> list[dict[str, Any]]:
    """Returns the evaluations of a step: {"split", ...}."""
    rows = [row for row in read_rows(workdir) if row["step"] == step and row["split"] != "train" and "count" in row]
    return [{"split": row["split"]} | {key: row[key] for key in _SHOWN if row.get(key) is not None} for row in rows]


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("vit_dist.exporting", "."),
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,
    finalize=lambda value: printable(str(value)),  # a name of several lines is written in one
)
_TEMPLATES.filters["as_json"] = lambda value: json.dumps(value, ensure_ascii=False)

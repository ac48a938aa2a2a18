"""The model card: a README.md that says what an exported model is, how it was made, and how it is opened."""

import json
from pathlib import Path
from typing import Any

import jinja2

from vit_dist.config import pair
from vit_dist.load import Opened
from vit_dist.paths import expanded
from vit_dist.run import workdir as run_files
from vit_dist.run.metrics import read_rows
from vit_dist.weights.description import Subject
from vit_dist.weights.traits import PREPARED, traits_of

FILE = "README.md"
_SHOWN = ("top1", "top5", "loss", "count")  # of an evaluation
_DATA = ("source", "name", "path", "classes", "fraction")
_RECIPE = (
    "total_steps",
    "total_epochs",
    "batch_size",
    "loss",
    "label_smoothing",
    "mixup",
    "cutmix",
    "ema_decay",
    "seed",
)
_OPTIMIZER = ("name", "learning_rate", "weight_decay", "schedule")


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
    step = int(opened.published.description.family.rpartition(" ")[2]) if is_run else None
    ours, theirs = traits_of(subject.model), traits_of(written.model)
    return {
        "is_run": is_run,
        "name": workdir.name if is_run else str(name),
        "family": opened.published.description.family,
        "step": step,
        "digest": None if is_run else opened.published.origin.digest(),
        "license": subject.license,
        "started": started,
        "parameters": sum(array.size for array in subject.parameters.values()),
        "model": {key: value for key, value in ours.items() if value not in (None, False, 0, "none")},
        "changed": [f"model.{key}: {ours[key]} as {theirs[key]}" for key in ours if ours[key] != theirs[key]],
        "image": [*pair(subject.model.image_size), subject.model.channels],
        "data": {key: getattr(settings.data, key) for key in PREPARED},
        "outputs": subject.model.num_classes or 0,
        "classes": classes,
        "averaged": is_run and settings.ema_decay > 0,
        "source": {key: value for key in _DATA if (value := getattr(settings.data, key, None))} if is_run else {},
        "recipe": _recipe(settings) if is_run else {},
        "metrics": _metrics(workdir, step) if is_run else [],
        "notes": opened.fitted.notes,
    }


def text(facts: dict[str, Any], format: str, input: str) -> str:
    """Returns the card of a model in a format; `input` is what a program takes."""
    return _TEMPLATES.get_template("card.md.jinja").render(**facts, format=format, input=input)


def _recipe(settings: Any) -> dict[str, Any]:
    values = {key: getattr(settings, key) for key in _RECIPE}
    values |= {f"optimizer.{key}": getattr(settings.optimizer, key) for key in _OPTIMIZER}
    return {key: value for key, value in values.items() if value not in (None, 0, 0.0) or key == "seed"}


def _metrics(workdir: Path, step: int | None) -> list[dict[str, Any]]:
    """Returns the evaluations of a step: {"split", ...}."""
    rows = [row for row in read_rows(workdir) if row["step"] == step and row["split"] != "train" and "count" in row]
    return [{"split": row["split"]} | {key: row[key] for key in _SHOWN if key in row} for row in rows]


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("vit_dist.exporting", "."), trim_blocks=True, lstrip_blocks=True, autoescape=False
)
_TEMPLATES.filters["as_json"] = lambda value: json.dumps(value, ensure_ascii=False)

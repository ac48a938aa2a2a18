"""`export`: a run of ours, or weights of others, as files that other libraries open: see `FORMATS`."""

import dataclasses
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from vit_dist.config import ConfigError
from vit_dist.data.files import making
from vit_dist.exporting import card, onnx, stablehlo
from vit_dist.exporting.function import Input
from vit_dist.job.rank import find_rank
from vit_dist.load import Opened, opened
from vit_dist.paths import expanded
from vit_dist.recipes import Overrides
from vit_dist.run import environment
from vit_dist.run import workdir as run_files
from vit_dist.run.checkpoints import Step
from vit_dist.weights import writing
from vit_dist.weights.description import Subject

FORMATS = (*writing.FORMATS, "stablehlo", "onnx")
_START_SECONDS = 60  # of a cluster's service, to say which process this is


def export(
    name: str | Path,
    out: str | Path,
    format: str,
    *,
    step: Step = "newest",
    input: Input = "float",
    converter: str | Path | None = None,
    overrides: Overrides = (),
) -> dict[str, Any]:
    """Writes a model into a new folder, with a model card: a run's moving average, where it keeps one.

    Args:
      name: the workdir of a run; or weights of others, as for `load`.
      out: the folder, which must not exist.
      format: one of `FORMATS`.
      step: which checkpoint of a run.
      input: what a program (stablehlo, onnx) takes: "float", normalised images; "uint8", pixels of the model's size.
      converter: for onnx, the Python of an environment with jax2onnx; None: this one.
      overrides: changes of `model` and `data`, as for `load`.

    Returns:
      `out, format, parameters, bytes, files, step, digest`, the last that of the weights of others, else None.

    Raises:
      ConfigError: the format cannot express the model, naming the key; `out` exists. Nothing is left behind.
    """
    if format not in FORMATS:
        raise ConfigError(f"export: format: {format!r:.40}, expected one of {', '.join(FORMATS)}")
    if input not in get_args(Input):
        raise ConfigError(f"export: input: {input!r:.40}, expected float or uint8")
    if format in writing.FORMATS and (input != "float" or converter is not None):
        option = "converter" if converter is not None else "input"
        raise ConfigError(f"export: {option} is of --format=stablehlo or onnx, and has no meaning in {format}")
    rank = find_rank(_START_SECONDS)
    if rank is not None and rank.count > 1:
        raise ConfigError("export: is for one process, and this job has several; run it outside the job")
    target = expanded(out, "export")
    if os.path.lexists(target):
        raise ConfigError(f"{target}: exists; export to a folder that does not")
    if not target.parent.is_dir():
        raise ConfigError(f"{target}: there is no folder {target.parent}; make it first")
    model = opened(name, overrides, step, "export")
    started = _started_from(name)
    subject = _subject(model, started.get("license"))
    if format in writing.FORMATS:
        files = writing.files_of(subject, format)
        fill: Callable[[Path], Any] = lambda folder: writing.save(files, folder)  # noqa: E731
        written = files.written
    elif format == "stablehlo":
        fill, written = (lambda folder: stablehlo.write(subject, input, folder)), subject
    else:
        written = onnx.prepared(subject)
        fill = lambda folder: onnx.write(written, input, converter, folder)  # noqa: E731
    facts = card.facts(Path(name), model, subject, written, started)

    def fill_all(folder: Path) -> None:
        fill(folder)
        (folder / card.FILE).write_text(card.text(facts, format, input), encoding="utf-8")

    names, size = _in_new_folder(target, fill_all)
    return {
        "out": str(target),
        "format": format,
        "parameters": sum(math.prod(array.shape) for array in written.parameters.values()),
        "bytes": size,
        "files": names,
        "step": facts["step"],
        "digest": facts["digest"],
    }


def _subject(model: Opened, license: str | None) -> Subject:
    """Returns the model with its numbers: those of a plain ViT, the blocks one by one.

    This is the one place where an export reads parameters, whatever its format.
    """
    parameters = {path: lazy.read() for path, lazy in model.fitted.parameters.items()}
    plain = dataclasses.replace(model.settings.model, scan=False, remat="none")
    known = model.published.license or license
    return Subject(plain, model.settings.data, parameters, model.classes, known)


def _started_from(name: str | Path) -> dict[str, Any]:
    """Returns what a run keeps of the weights that it started from; nothing for others."""
    file = expanded(name, "export") / environment.FILE
    if not run_files.holds_run(file.parent) or not file.is_file():
        return {}
    sessions = environment.sessions(file.parent)
    return next((session["weights"] for session in sessions if session.get("weights")), {})


def _in_new_folder(target: Path, fill: Callable[[Path], None]) -> tuple[list[str], int]:
    """Makes a folder whole or not at all; returns the names of its files and their bytes."""
    with making(target):
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        folder = beside / target.name
        folder.mkdir()
        fill(folder)
        found = sorted(file for file in folder.iterdir())
        names, size = [file.name for file in found], sum(file.stat().st_size for file in found)
        if os.path.lexists(target):
            raise ConfigError(f"{target}: was made by another process; export to a folder that does not exist")
        folder.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return names, size

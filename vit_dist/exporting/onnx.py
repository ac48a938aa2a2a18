"""A model as ONNX, by jax2onnx in an environment of its own: it needs an older orbax than ours.

    python3 -m venv onnx && onnx/bin/pip install jax2onnx onnxruntime ml-collections
    vit-dist export --workdir=D --format=onnx --converter=onnx/bin/python OUT

That Python runs `convert` of this package on a folder with the model. It converts the function that `stablehlo` writes,
runs the result by onnxruntime, and refuses one whose logits differ from jax's.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from vit_dist.config import ConfigError
from vit_dist.exporting.function import Input
from vit_dist.weights.description import Subject
from vit_dist.weights.equivalents import EQUIVALENTS
from vit_dist.weights.traits import PREPARED, traits_of

FILE = "model.onnx"
NEEDED = ("jax2onnx", "onnxruntime", "ml_collections", "flax", "optax")
_INSTALL = "python3 -m venv onnx && onnx/bin/pip install jax2onnx onnxruntime ml-collections"
_CHECK = f"import importlib.util as u; print(*(n for n in {NEEDED!r} if u.find_spec(n) is None))"


def prepared(subject: Subject) -> Subject:
    """Returns an equal model that jax2onnx can convert, in float32: fixed positions are taken as learned ones."""
    learned = EQUIVALENTS["position"](subject, "learned") if subject.model.position == "sincos2d" else None
    subject = learned or subject
    return dataclasses.replace(subject, model=dataclasses.replace(subject.model, dtype="float32"))


def write(subject: Subject, input: Input, converter: str | Path | None, folder: Path) -> None:
    """Writes model.onnx into a folder.

    Args:
      subject: the model.
      input: as for `stablehlo`.
      converter: the Python that runs jax2onnx; None: this one.
      folder: an empty one.

    Raises:
      ConfigError: that Python does not run, lacks a package, or its jax2onnx cannot convert the model.
    """
    python = sys.executable if converter is None else str(converter)
    missing = _run(python, "-c", _CHECK).split()
    if missing:
        raise ConfigError(
            f"export: --format=onnx needs {', '.join(missing)}, which {python} does not have; make an environment "
            f"for it ({_INSTALL}) and name its Python: --converter=onnx/bin/python"
        )
    with tempfile.TemporaryDirectory() as work:
        np.savez(Path(work) / "parameters.npz", **subject.parameters)  # type: ignore[arg-type]
        data = {key: getattr(subject.data, key) for key in PREPARED}
        values = {"model": {**traits_of(subject.model), "scan": False}, "data": data, "input": input}
        (Path(work) / "model.json").write_text(json.dumps(values))
        _run(python, "-m", "vit_dist.exporting.convert", work, str(folder / FILE))
    if not (folder / FILE).is_file():
        raise ConfigError(f"export: --converter={python}: has written no {FILE}; name a Python that has jax2onnx")


def _run(python: str, *arguments: str) -> str:
    """Returns what a Python with this package on its path prints on stdout; raises `ConfigError` if it fails."""
    package = Path(__file__).resolve().parents[1]
    # Nothing else of this environment, where the package may be installed beside libraries too new for the converter's.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / package.name).symlink_to(package)
        variables = {**os.environ, "PYTHONPATH": folder, "JAX_PLATFORMS": "cpu"}
        try:
            done = subprocess.run([python, *arguments], env=variables, capture_output=True, text=True, check=False)
        except OSError as error:
            message = f"export: --converter={python}: cannot be run ({error.strerror}); name a Python"
            raise ConfigError(message) from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing said"]
        raise ConfigError(f"export: --converter={python}: cannot convert the model ({lines[-1][:300]})")
    return done.stdout

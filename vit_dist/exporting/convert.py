"""Converts a model to ONNX and compares it with jax's: run by `onnx`, in the environment of the converter.

    python -m vit_dist.exporting.convert FOLDER FILE.onnx

FOLDER has model.json (`model` and `data` as our keys, `input`) and parameters.npz.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np

from vit_dist import config
from vit_dist.exporting.function import function_of, images_of

TOLERANCE = 1e-4  # of the largest difference of any logit, over their standard deviation
BATCHES = (1, 3)


def main(folder: Path, file: Path) -> None:
    """Writes the file; raises `ValueError` if its logits are not jax's."""
    import jax2onnx
    import onnxruntime

    values = json.loads((folder / "model.json").read_text())
    settings = config.resolve({"total_steps": 1, "model": values["model"], "data": values["data"]})
    with np.load(folder / "parameters.npz") as arrays:
        parameters = {path: arrays[path] for path in arrays.files}
    run = function_of(settings.model, settings.data, values["input"])
    images = images_of(settings.model, values["input"], 1)
    spec = types.SimpleNamespace(shape=("batch", *images.shape[1:]), dtype=images.dtype)
    jax2onnx.to_onnx(
        lambda x: run(parameters, x),
        [spec],
        return_mode="file",
        output_path=file,
        input_names=["images"],
        output_names=["logits"],
    )
    session = onnxruntime.InferenceSession(str(file))
    for count in BATCHES:
        pixels = np.random.default_rng(count).integers(0, 256, (count, *images.shape[1:]))
        batch = pixels.astype(np.uint8) if values["input"] == "uint8" else (pixels / 127.5 - 1).astype(np.float32)
        (found,) = session.run(["logits"], {"images": batch})
        expected = np.asarray(run(parameters, batch))
        error = float(np.abs(found - expected).max() / max(expected.std(), 1e-6))
        if not error <= TOLERANCE:
            raise ValueError(f"at batch {count} a logit is {error:.1e} standard deviations from jax's")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

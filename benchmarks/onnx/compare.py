"""Exports models of ours to ONNX and compares what onnxruntime computes with jax's logits: a table in Markdown.

    python benchmarks/onnx/compare.py PYTHON

PYTHON is that of an environment with `requirements.txt` beside this file. The exit code is 1 if a model is not
converted or a logit differs by more than 1e-4 of their standard deviation.
"""

import argparse
import datetime
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.exporting.function import Input
from vit_dist.exporting.verb import export
from vit_dist.load import load
from vit_dist.step.state import ModelFunction
from vit_dist.weights import writing
from vit_dist.weights.description import Subject
from vit_dist.weights.published import by_path

TOLERANCE = 1e-4
BATCHES = (1, 17)
SMALL: dict[str, Any] = {
    "width": 64, "depth": 3, "mlp": 128, "heads": 4, "image_size": 48, "patch_size": 16, "num_classes": 10,
    "scan": False, "head_zero_init": False,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "cls": {},
    "sincos2d, mean": {"position": "sincos2d", "pool": "mean"},
    "rope2d, registers, swiglu, rmsnorm": {
        "position": "rope2d", "registers": 4, "activation": "swiglu", "norm": "rmsnorm", "pool": "mean",
    },
    "map, gelu_tanh": {"pool": "map", "activation": "gelu_tanh"},
    "qk_norm, layer_scale": {"qk_norm": True, "layer_scale": 0.1},
    "parallel": {"parallel": True, "qkv_bias": False},
    "CLIP": {"embedding_norm": "tokens", "activation": "quick_gelu", "norm_epsilon": 1e-5, "output_projection": 24},
    "cls_mean, pre_logits": {"pool": "cls_mean", "pre_logits": 32},
    "bfloat16": {"dtype": "bfloat16"},
}  # fmt: skip
RUN = """
import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
images = np.load(sys.argv[2])
np.savez(sys.argv[3], **{str(n): session.run(["logits"], {"images": images[:n]})[0] for n in (1, 17)})
"""


def error(keys: dict[str, Any], input: Input, python: str, folder: Path) -> float:
    """Returns the largest error of a model's logits over their standard deviation; raises `ConfigError`."""
    model = config.resolve({"total_steps": 1, "model": {**SMALL, **keys}}).model
    parameters = {path: np.asarray(leaf) for path, leaf in by_path(ModelFunction(model).initialise(0)).items()}
    ours, out = folder / "ours", folder / "out"
    data = config.Data(mean=(0.4, 0.5, 0.6), std=0.25, eval_crop_mode="squash", eval_crop=1.0)
    files = writing.files_of(Subject(model, data, parameters), "safetensors")
    ours.mkdir()
    writing.save(files, ours)
    export(ours, out, "onnx", input=input, converter=python)
    pixels = np.random.default_rng(0).integers(0, 256, (max(BATCHES), 48, 48, 3)).astype(np.uint8)
    mean, std = (np.asarray(value, np.float32) for value in (data.mean, data.std))
    normalised = (pixels / np.float32(255) - mean) / std
    np.save(folder / "images.npy", pixels if input == "uint8" else normalised)
    arguments = [str(out / "model.onnx"), str(folder / "images.npy"), str(folder / "found.npz")]
    subprocess.run([python, "-c", RUN, *arguments], check=True)
    expected = load(ours, overrides={"model.dtype": "float32"}).model(normalised)
    with np.load(folder / "found.npz") as found:
        return max(float(np.abs(found[str(n)] - expected[:n]).max() / expected.std()) for n in BATCHES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", help="of the environment with jax2onnx")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    lines = (Path(__file__).parent / "requirements.txt").read_text().split()
    pins = [line.replace("==", " ") for line in lines if "==" in line]
    print(f"# Models of ours as ONNX, run by onnxruntime, {datetime.date.today()}\n")
    print(f"On a CPU, with {', '.join(pins)} in an environment of their own. By\n\n    make onnx\n")
    print(
        "Models of depth 3 with random numbers. An error is the largest difference of any logit from jax's, at batch 1"
    )
    print(f"and 17, over their standard deviation; {TOLERANCE:.0e} is allowed.\n")
    print("| model | float | uint8 |\n|---|---|---|")
    bad = []
    for name, keys in CASES.items():
        cells = []
        for input in ("float", "uint8"):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    found = error(keys, input, options.python, Path(folder))
                    cells.append(f"{found:.1e}")
                    bad += [] if found <= TOLERANCE else [name]
                except ConfigError as problem:
                    cells.append(f"not converted: {problem}")
                    bad.append(name)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    if bad:
        sys.exit(f"error: not as they should be: {', '.join(bad)}")


if __name__ == "__main__":
    main()

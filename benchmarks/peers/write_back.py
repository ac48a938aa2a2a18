"""Writes the files of other libraries' models, and models of our own, by `vit-dist export`, for `peers.read_back`.

    PYTHONPATH=benchmarks python -m peers.write_back FOLDER

FOLDER/NAME is what `peers.golden` wrote, and FOLDER/ours_NAME is made here: our own format with random numbers, and our
own outputs. Of each, NAME/written_FORMAT is made for every format, or written_FORMAT.txt with why there is none.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from peers import random_weights
from peers.compare import GOLDEN, PREPARED
from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.exporting import verb
from vit_dist.load import load
from vit_dist.weights import writing
from vit_dist.weights.description import Subject
from vit_dist.weights.published import shapes_of

FORMATS = ("timm", "huggingface", "npz")
SMALL: dict[str, Any] = {
    "width": 64, "depth": 3, "mlp": 128, "heads": 4, "image_size": 48, "patch_size": 16, "num_classes": 10,
    "scan": False,
}  # fmt: skip
# Models that no library has as they are: with what training changes, or with what only an equal model can express.
OURS: dict[str, dict[str, Any]] = {
    "cls": {},
    "mean": {"pool": "mean"},
    "sincos2d": {"pool": "mean", "position": "sincos2d"},
    "no_position": {"position": "none"},
    "registers": {"registers": 4},
    "mean_registers": {"pool": "mean", "class_token": True, "registers": 4},
    "layer_scale": {"layer_scale": 0.1},
    "no_cls_position": {"cls_position": False},
    "key_biases": {"position": "rope2d", "registers": 4, "layer_scale": 0.1, "norm_epsilon": 1e-5},
    "key_biases_features": {"position": "rope2d", "registers": 4, "norm_epsilon": 1e-5, "num_classes": 0},
    "patch_bias": {"embedding_norm": "tokens", "norm_epsilon": 1e-5, "num_classes": 0},
    "projection": {"embedding_norm": "tokens", "norm_epsilon": 1e-5, "num_classes": 0, "output_projection": 24},
    "swiglu": {"activation": "swiglu", "layer_scale": 0.1},
    "tanh": {"activation": "gelu_tanh"},
    "map_tanh": {"activation": "gelu_tanh", "pool": "map"},
}


def make_own(folder: Path, keys: dict[str, Any]) -> None:
    """Writes a model of ours with random numbers, and its outputs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = config.resolve({"total_steps": 1, "model": {**SMALL, **keys}}).model
    parameters = {path: _random(path, shape) for path, shape in shapes_of(model).items()}
    data = config.Data(eval_crop=1.0, eval_crop_mode="squash")
    writing.save(writing.files_of(Subject(model, data, parameters), "safetensors"), folder)
    images = random_weights.images(2, 48, 48)
    loaded = load(folder)
    outputs: dict[str, Any] = {"features": loaded.features(images)} | (
        {"logits": loaded.model(images)} if model.num_classes else {}
    )
    np.savez(folder / "expected.npz", images=images, **outputs)


def _random(path: str, shape: tuple[int, ...]) -> np.ndarray:
    x = random_weights.normal(path, shape)
    if path.endswith("scale"):
        return np.asarray(0.8 + 0.2 * x, np.float32)
    return np.asarray(0.1 * x, np.float32)


def write(folder: Path) -> None:
    """Exports what a folder holds in every format."""
    (weights,) = [*folder.glob("*.safetensors"), *folder.glob("model.npz")]
    with np.load(folder / "expected.npz") as arrays:
        size = arrays["images"].shape[1:3]
    for name in FORMATS:
        out, reason = folder / f"written_{name}", folder / f"written_{name}.txt"
        shutil.rmtree(out, ignore_errors=True)
        reason.unlink(missing_ok=True)
        try:
            verb.export(weights, out, name, overrides={**PREPARED, "model.image_size": size})
        except ConfigError as error:
            reason.write_text(str(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what peers.golden wrote")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    for name, keys in OURS.items():
        make_own(options.folder / f"ours_{name}", keys)
        write(options.folder / f"ours_{name}")
    for file in sorted(GOLDEN.glob("*.json")):
        if file.stem != "timm_keys":
            write(options.folder / file.stem)
        jax.clear_caches()


if __name__ == "__main__":
    main()

"""The files of other libraries made again from their golden fixtures; `benchmarks/peers/golden.py` wrote those."""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from peers import random_weights

FOLDER = pathlib.Path(__file__).parents[1] / "weights/golden"
NAMES = sorted(file.stem for file in FOLDER.glob("*.json") if file.stem != "timm_keys")


def fixture(name: str) -> dict[str, Any]:
    """Returns a fixture; its keys are those that `benchmarks/peers/golden.py` lists."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def tensors(fixture: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns the weights of a fixture by their names in its file, float32 or bfloat16."""
    dtype = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}[fixture["dtype"]]
    sizes = fixture["embedding"], fixture["branch"]
    return {
        name: random_weights.weight(name, tuple(shape), *sizes).astype(dtype)
        for name, shape in fixture["tensors"].items()
    }


def images(fixture: dict[str, Any]) -> np.ndarray:
    """Returns the normalised images of a fixture, float32 [B, H, W, C]."""
    return random_weights.images(*fixture["images"])


def outputs(fixture: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns what its library computed, float32 [B, ...]: `logits`, `features` or both."""
    return {name: np.asarray(value, np.float32) for name, value in fixture["outputs"].items()}


def write(fixture: dict[str, Any], folder: pathlib.Path, arrays: dict[str, np.ndarray] | None = None) -> pathlib.Path:
    """Writes the config and weights of a fixture into a folder, or other weights; returns the file of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if fixture["config"] is not None:
        (folder / fixture["config_file"]).write_text(json.dumps(fixture["config"]))
    file = folder / fixture["weights_file"]
    arrays = tensors(fixture) if arrays is None else arrays
    if file.suffix == ".npz":
        np.savez(file, **arrays)  # bfloat16 as two void bytes
    else:
        write_safetensors(file, arrays)
    return file


def write_safetensors(file: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a file of safetensors: the length of a header, the header, the numbers of all tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int64": "I64"}[array.dtype.name]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            stream.write(np.ascontiguousarray(array).tobytes())

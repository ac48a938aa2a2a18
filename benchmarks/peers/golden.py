"""Writes the files and outputs of other libraries' models, and golden fixtures of a few kilobytes for the tests.

    PYTHONPATH=benchmarks .cache/peers/bin/python -m peers.golden --out=.cache/peers/files

For each case, FOLDER/NAME holds what its library wrote, with random weights, and `expected.npz`: the images
[B, H, W, C] and the outputs. `tests/weights/golden/NAME.json` holds the same without the numbers of images and weights,
which `random_weights` makes again:

- `library`, `config` (the content of the file named `config_file`), `weights_file`.
- `tensors`: shapes by name; `dtype` of all of them; `embedding` and `branch`, the sizes of the random weights.
- `images`: their shape.
- `outputs`: `logits` and `features`, the head's input, float32.
- `mistakes`: what the largest error of the outputs would be, over their standard deviation, with another epsilon and
  another kind of GELU. A case in which they would be hard to see fails.

--all also writes the files of every plain ViT of timm, without fixtures. --only=TEXT chooses names that contain TEXT.
"""

import argparse
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from peers import npz_cases, open_clip_cases, random_weights, timm_cases, transformers_cases
from peers.case import Case, Outputs, fill
from peers.inspected import activation

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "tests/weights/golden"
TOLERANCE = 1e-4  # of a comparison, over the standard deviation of the outputs
VISIBLE = 5  # mistakes are at least so many times the tolerance
OTHER_EPSILON = {1e-6: 1e-5, 1e-5: 1e-6, 1e-12: 1e-6}
OTHER_GELU = {"gelu": nn.GELU(approximate="tanh"), "gelu_tanh": nn.GELU(), "quick_gelu": nn.GELU()}


def error(found: Outputs, expected: Outputs) -> float:
    """Returns the largest error of any output over the standard deviation of its kind."""
    return max(float((found[name] - value).abs().max() / value.std()) for name, value in expected.items())


def mistakes(model: nn.Module, case: Case, images: torch.Tensor, expected: Outputs) -> dict[str, float]:
    """Returns the error of the outputs with another epsilon in all norms, and with another GELU."""
    result = {}
    norms = [module for module in model.modules() if isinstance(getattr(module, "eps", None), float)]
    right = [module.eps for module in norms]
    for module in norms:
        module.eps = OTHER_EPSILON[module.eps]
    result["norm_epsilon"] = error(case.outputs(model, images), expected)
    for module, epsilon in zip(norms, right):
        module.eps = epsilon
    swapped = 0
    for module in list(model.modules()):
        for name, child in module.named_children():
            kind = activation(child) if "elu" in type(child).__name__.lower() else None
            if kind in OTHER_GELU:
                setattr(module, name, OTHER_GELU[kind])
                swapped += 1
    if swapped:
        result["activation"] = error(case.outputs(model, images), expected)
    return result


def cases(every: bool) -> Iterator[Case]:
    """Yields all cases."""
    for module in (timm_cases, transformers_cases, open_clip_cases, npz_cases):
        yield from module.golden()
    if every:
        yield from timm_cases.every()


def run(case: Case, folder: pathlib.Path) -> dict[str, Any]:
    """Writes the files of a case; returns its fixture."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    case.save(folder)
    file = folder / case.weights
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            shapes = {name: list(arrays[name].shape) for name in arrays.files}
            (dtype,) = {"BF16" if arrays[name].dtype == np.dtype("V2") else "F32" for name in arrays.files}
    else:
        shapes, dtype = fill(file, case.embedding, case.branch), "F32"
    images = random_weights.images(2, *case.image)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    model, again = (seeded(case, folder, seed) for seed in (0, 1))
    outputs = case.outputs(model, pixels)
    if error(case.outputs(again, pixels), outputs) > 0:
        raise ValueError(f"{case.name}: the library did not find all of its weights in the file")
    np.savez(folder / "expected.npz", images=images, **{name: value.numpy() for name, value in outputs.items()})
    wrong = mistakes(model, case, pixels, outputs)
    return {
        "library": case.library,
        "config_file": case.config,
        "config": json.loads((folder / case.config).read_text()) if case.config else None,
        "weights_file": case.weights,
        "dtype": dtype,
        "embedding": case.embedding,
        "branch": case.branch,
        "tensors": shapes,
        "images": list(images.shape),
        "outputs": {name: value.tolist() for name, value in outputs.items()},
        "mistakes": wrong,
    }


def seeded(case: Case, folder: pathlib.Path, seed: int) -> nn.Module:
    """Returns the model in the file; what the file lacks is drawn with this seed."""
    torch.manual_seed(seed)
    return case.load(folder).eval()


def as_text(fixture: dict[str, Any]) -> str:
    """Returns a fixture as JSON with a line for each key, and numbers of nine digits, which float32 needs."""
    rounded = {name: [[float(f"{x:.9g}") for x in row] for row in rows] for name, rows in fixture["outputs"].items()}
    wrong = {name: float(f"{value:.2g}") for name, value in fixture["mistakes"].items()}
    fixture = fixture | {"outputs": rounded, "mistakes": wrong}
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in fixture.items()) + "\n}\n"


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for the files")
    parser.add_argument("--all", action="store_true", help="every plain ViT of timm too")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    hidden: list[str] = []
    names: dict[str, set[str]] = {}
    print("case | tensors | fixture, bytes | std of outputs | another epsilon | another GELU")
    for case in cases(options.all):
        if options.only not in case.name:
            continue
        fixture = run(case, options.out / case.name)
        names[case.name] = set(fixture["tensors"])
        written = case.name.removesuffix("_new_names")
        if written != case.name and names.get(written) == names[case.name]:
            shutil.rmtree(options.out / case.name)  # the modules have the names that are written
            continue
        file = GOLDEN / f"{case.name}.json"
        text = as_text(fixture)
        if not case.name.startswith("all_"):
            file.write_text(text)
        deviations = {name: float(np.std(value)) for name, value in fixture["outputs"].items()}
        wrong = fixture["mistakes"]
        columns = [
            case.name,
            str(len(fixture["tensors"])),
            str(len(text)),
            ", ".join(f"{name} {value:.2g}" for name, value in deviations.items()),
            *(f"{value:.1e}" for value in wrong.values()),
        ]
        print(" | ".join(columns), flush=True)
        if min(wrong.values()) < VISIBLE * TOLERANCE or not np.isfinite(list(deviations.values())).all():
            hidden.append(case.name)
    if hidden:
        raise SystemExit(f"error: mistakes would not be seen in {', '.join(hidden)}")


if __name__ == "__main__":
    main()

"""Compares our outputs with those of the libraries whose files they are made of: tables in Markdown.

    python -m peers.golden --all --out=FOLDER         # where these libraries are installed; see golden.py
    python benchmarks/peers/compare.py FOLDER         # here

FOLDER/NAME holds the weights that a library wrote, and `expected.npz`, what it computed of them. Each is opened as a
user opens it, by `vit_dist.load`, on one device and in float32. An error is the largest difference of any number over
the standard deviation of the library's. The exit code is 1 if a file that should load does not, or an error is above
1e-4.
"""

import argparse
import datetime
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from vit_dist.config import ConfigError
from vit_dist.load import load
from vit_dist.weights import timm_architectures

TOLERANCE = 1e-4
HERE = Path(__file__).parent
GOLDEN = HERE.parents[1] / "tests/weights/golden"
# How pictures would be prepared. Here they are prepared already, and files of random weights need not say it.
PREPARED = {
    "data.mean": 0.5,
    "data.std": 0.5,
    "data.interpolation": "bilinear",
    "data.eval_crop_mode": "squash",
    "data.eval_crop": 1.0,
}

Errors = dict[str, float]


def errors(weights: Path, images: np.ndarray, expected: Mapping[str, np.ndarray]) -> Errors:
    """Returns the errors of our outputs by their names, `features` and `logits`.

    Args:
      weights: a file, with its config beside it.
      images: [B, H, W, C], normalised.
      expected: the outputs of its own library, [B, ...].

    Raises:
      ConfigError: our model cannot be made of the file.
    """
    model = load(weights, overrides={**PREPARED, "model.image_size": images.shape[1:3]})
    functions = {"features": model.features, "logits": model.model}
    found = {name: functions[name](images) for name in expected}
    return {name: float(np.abs(found[name] - value).max() / value.std()) for name, value in expected.items()}


def compare(folder: Path) -> Errors | ConfigError:
    """Returns the errors of a case, or why its file was not opened."""
    with np.load(folder / "expected.npz") as arrays:
        # `pooler_output`, of a layer that follows ViTModel's features, is left out.
        expected = {name: arrays[name] for name in ("features", "logits") if name in arrays.files}
        images = arrays["images"]
    (weights,) = [*folder.glob("*.safetensors"), *folder.glob("model.npz")]
    try:
        return errors(weights, images, expected)
    except ConfigError as error:
        return error
    finally:
        jax.clear_caches()  # hundreds of compiled models would fill the memory


def is_good(result: Errors | ConfigError | None) -> bool:
    """Returns whether a case was compared and agrees."""
    return isinstance(result, dict) and max(result.values()) <= TOLERANCE


def cells(result: Errors | ConfigError) -> str:
    """Returns the errors of features and logits as cells of a row, or why there are none."""
    if isinstance(result, ConfigError):
        return f"not opened: {result} | |"
    return " | ".join(f"{result[name]:.1e}" if name in result else "" for name in ("features", "logits")) + " |"


def worst(results: Iterable[Errors | ConfigError]) -> str:
    """Returns the largest error of those that were compared."""
    return f"{max(max(result.values()) for result in results if isinstance(result, dict)):.1e}"


def entry_points() -> dict[str, list[str]]:
    """Returns timm's plain ViTs by where timm defines them."""
    groups: dict[str, list[str]] = {}
    for cls, rows in timm_architectures.table()["architectures"].items():
        for name in rows:
            module = "eva.py" if cls == "Eva" else "deit.py" if name.startswith("deit") else "vision_transformer.py"
            groups.setdefault(f"`{module}`, {cls}", []).append(name)
    return groups


def report(results: Mapping[str, Errors | ConfigError]) -> list[str]:
    """Prints the tables; returns the names of what should agree and does not."""
    golden = {name: result for name, result in results.items() if not name.startswith("all_")}
    print(f"## {len(golden)} files of all families\n")
    print("| case | written by | features | logits |\n|---|---|---|---|")
    for name, result in golden.items():
        library = json.loads((GOLDEN / f"{name}.json").read_text())["library"]
        print(f"| {name} | {library} | {cells(result)}")
    print(f"\nThe largest error is {worst(golden.values())}.\n")

    table = timm_architectures.table()
    print(f"## Every plain ViT of timm {table['timm']}\n")
    print("| defined in | entry points | ours agrees | largest error |\n|---|---|---|---|")
    wrong = [name for name, result in golden.items() if not is_good(result)]
    for group, names in entry_points().items():
        own = {name: results.get(f"all_{name}") for name in names}
        good = [name for name, result in own.items() if is_good(result)]
        wrong += [name for name in names if name not in good and name not in table["unsupported"]]
        largest = worst([result for result in own.values() if result is not None]) if good else ""
        print(f"| {group} | {len(names)} | {len(good)} | {largest} |")
    print("\nOur model cannot be the others, which have:\n\n| entry point | what |\n|---|---|")
    for name, lacking in table["unsupported"].items():
        print(f"| {name} | {', '.join(lacking)} |")
    print("\n| entry point | features | logits |\n|---|---|---|")
    for name, result in results.items():
        if name not in golden:
            print(f"| {name.removeprefix('all_')} | {cells(result)}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what peers.golden wrote")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    pins = [line.replace("==", " ") for line in (HERE / "requirements.txt").read_text().split() if "==" in line]
    print(f"# Our outputs beside those of other libraries, from their files, {datetime.date.today()}\n")
    cores, python = os.cpu_count(), platform.python_version()
    print(f"A CPU ({platform.machine()}, {cores} cores), Python {python}, jax {jax.__version__};")
    print(f"theirs: {', '.join(pins)}. By\n\n    make peers\n")
    print("Models of depth 3 with random weights, opened by `vit_dist.load` and run in float32. An error is the")
    print("largest difference of any number over the standard deviation of theirs;", f"{TOLERANCE:.0e} is allowed.\n")
    folders = sorted(file.parent for file in options.folder.glob("*/expected.npz"))
    wrong = report({folder.name: compare(folder) for folder in folders})
    if wrong:
        shown = ", ".join(wrong[:8]) + (" ..." if len(wrong) > 8 else "")
        sys.exit(f"error: {len(wrong)} are not there, not opened, or above {TOLERANCE:.0e}: {shown}")


if __name__ == "__main__":
    main()

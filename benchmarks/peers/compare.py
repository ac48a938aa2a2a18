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
Result = Errors | str  # of a case: its errors, or why there are none


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


def compare(folder: Path) -> Result:
    """Returns the errors of a case, or why there are none."""
    if not folder.exists():
        return "not there"
    with np.load(folder / "expected.npz") as arrays:
        # `pooler_output`, of a layer that follows ViTModel's features, is left out.
        expected = {name: arrays[name] for name in ("features", "logits") if name in arrays.files}
        images = arrays["images"]
    (weights,) = [*folder.glob("*.safetensors"), *folder.glob("model.npz")]
    try:
        return errors(weights, images, expected)
    except ConfigError as error:
        return f"not opened: {error}"
    finally:
        jax.clear_caches()  # hundreds of compiled models would fill the memory


def is_good(result: Result) -> bool:
    """Returns whether a case was compared and agrees."""
    return isinstance(result, dict) and max(result.values()) <= TOLERANCE


def cells(result: Result) -> str:
    """Returns the errors of features and logits as cells of a row, or why there are none."""
    if isinstance(result, str):
        return f"{result} | |"
    return " | ".join(f"{result[name]:.1e}" if name in result else "" for name in ("features", "logits")) + " |"


def worst(results: Iterable[Result]) -> str:
    """Returns the largest error of those that were compared."""
    return f"{max((max(result.values()) for result in results if isinstance(result, dict)), default=0):.1e}"


def families(folder: Path) -> list[str]:
    """Prints the table of the golden fixtures' files; returns the names of those that do not agree."""
    fixtures = sorted(file for file in GOLDEN.glob("*.json") if file.stem != "timm_keys")
    print(f"## {len(fixtures)} files of all families\n")
    print("| case | written by | features | logits |\n|---|---|---|---|")
    results: dict[str, Result] = {}
    for file in fixtures:
        results[file.stem] = compare(folder / file.stem)
        library = json.loads(file.read_text())["library"]
        print(f"| {file.stem} | {library} | {cells(results[file.stem])}", flush=True)
    print(f"\nThe largest error is {worst(results.values())}.\n")
    return [name for name, result in results.items() if not is_good(result)]


def entry_points(folder: Path) -> list[str]:
    """Prints the tables of timm's plain ViTs; returns the names of those that should agree and do not."""
    table = timm_architectures.table()
    groups: dict[str, list[str]] = {}
    for cls, rows in table["architectures"].items():
        for name in rows:
            module = "eva.py" if cls == "Eva" else "deit.py" if name.startswith("deit") else "vision_transformer.py"
            groups.setdefault(f"`{module}`, {cls}", []).append(name)
    print(f"## Every plain ViT of timm {table['timm']}\n")
    print("| defined in | entry points | ours agrees | largest error |\n|---|---|---|---|")
    results: dict[str, Result] = {}
    for group, names in groups.items():
        own = {name: compare(folder / f"all_{name}") for name in names if name not in table["unsupported"]}
        good = sum(map(is_good, own.values()))
        print(f"| {group} | {len(names)} | {good} | {worst(own.values()) if own else ''} |", flush=True)
        results |= own
    print("\nOur model cannot be the others, which have:\n\n| entry point | what |\n|---|---|")
    for name, lacking in table["unsupported"].items():
        print(f"| {name} | {', '.join(lacking)} |")
    print("\n| entry point | features | logits |\n|---|---|---|")
    for name, result in results.items():
        print(f"| {name} | {cells(result)}")
    return [name for name, result in results.items() if not is_good(result)]


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
    wrong = families(options.folder) + entry_points(options.folder)
    if wrong:
        shown = ", ".join(wrong[:8]) + (" ..." if len(wrong) > 8 else "")
        sys.exit(f"error: {len(wrong)} are not there, not opened, or above {TOLERANCE:.0e}: {shown}")


if __name__ == "__main__":
    main()

"""Checks that two checkouts train alike, by the rows of three recipes, a few steps each, on one and on eight devices.

    .venv/bin/python benchmarks/same_rows.py OLD NEW [--steps=50]

Use it for changes that should not change any number. It compares all values of a row, except its timings, bitwise. The
exit code is 1 if any differ. It skips recipes whose data are not in `../shared/data`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RECIPES = {
    "digits": (),
    "d2l_fashion_mnist": (f"data.path={DATA / 'fashion_mnist_900'}", "batch_size=32"),
    "cifar10": (f"data.path={DATA / 'cifar10'}", "batch_size=32", "evaluate.every_steps=0", "model.heads=4"),
}
MESHES = {
    "1 device": ("fake_devices=1", "mesh.data=1"),
    "data=2 x fsdp=2 x tensor=2": ("fake_devices=8", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
}
TIMINGS = ("images_per_second", "images_per_second_per_device", "step_ms", "data_wait_fraction", "mfu", "memory_bytes")


def rows(checkout: Path, recipe: str, overrides: tuple[str, ...]) -> list[dict[str, Any]]:
    """Runs a recipe of a checkout; returns the rows without their timings."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            f"--config=configs/{recipe}.py",
            f"--workdir={folder}/run",
            *(f"--config.{override}" for override in overrides),
        ]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        command = [sys.executable, "-m", "vit_dist", "train", *words]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"error: {checkout}: {recipe}: {done.stderr[-2000:]}")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in TIMINGS} for line in lines]


def main() -> int:
    """Prints a line for each recipe and mesh."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    alike = True
    for recipe, own in RECIPES.items():
        if any(key.startswith("data.path=") and not Path(key.partition("=")[2]).exists() for key in own):
            print(f"{recipe}: skipped, its data are missing")
            continue
        for mesh, sizes in MESHES.items():
            overrides = (f"total_steps={options.steps}", "log_every=1", f"evaluate.every_steps={options.steps}")
            old, new = (rows(tree.resolve(), recipe, (*overrides, *own, *sizes)) for tree in (options.old, options.new))
            same = old == new
            alike &= same
            print(f"{recipe}, {mesh}: {len(old)} rows, {'identical' if same else 'DIFFERENT'}", flush=True)
    return 0 if alike else 1


if __name__ == "__main__":
    sys.exit(main())

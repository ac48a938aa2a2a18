"""Checks that a run of an older checkout can be resumed, evaluated and used by a newer one.

    .venv/bin/python benchmarks/old_run.py OLD NEW

OLD trains the digits for 20 of 40 steps; NEW resumes that working directory, evaluates it and classifies an image. It
prints the results of NEW, and the exit code is 1 if a command fails or a count is wrong.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def run(checkout: Path, *words: str) -> Any:
    """Runs a verb of a checkout; returns the last line of its stdout, read as JSON."""
    command = [sys.executable, "-m", "vit_dist", *words]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=lambda text: Path(text).resolve(), help="the checkout that trains")
    parser.add_argument("new", type=lambda text: Path(text).resolve(), help="the checkout that goes on")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train = ("train", "--config=configs/digits.py", f"--workdir={folder}/run")
        run(options.old, *train, "--config.total_steps=20")
        Image.fromarray((load_digits().images[0] * 255 / 16).astype(np.uint8)).save(f"{folder}/digit.png")
        resumed = run(options.new, *train, "--config.total_steps=40")
        evaluated = run(options.new, "eval", f"--workdir={folder}/run")
        predicted = run(options.new, "predict", f"--workdir={folder}/run", "--json", f"{folder}/digit.png")
    for result in (resumed, evaluated, predicted):
        print(json.dumps(result))
    as_expected = (resumed["step"], evaluated["step"], evaluated["count"]) == (40, 40, 360)
    return 0 if as_expected and len(predicted["classes"]) == 5 else 1


if __name__ == "__main__":
    sys.exit(main())

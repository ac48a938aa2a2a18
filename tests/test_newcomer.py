"""A newcomer's path: the commands of the README's section on fine-tuning, in an empty folder."""

import csv
import os
import shlex
import subprocess
import sys
from pathlib import Path

import cv2
import golden_weights
import numpy as np
import pytest
from golden_weights import fixture
from system import ROOT

from vit_dist import load
from vit_dist.data.sets.formats.idx import read_digits

# Where `make peers` has installed timm.
TIMM = Path(os.environ.get("PEERS", ROOT / ".cache" / "peers" / "bin" / "python"))


def commands():
    """The lines of the section's first block."""
    section = (ROOT / "README.md").read_text().partition("## Fine-tuning\n")[2].partition("\n## ")[0]
    return [line.strip() for line in section.partition("    ")[2].partition("\n\n")[0].splitlines()]


def images(folder):
    """200 digits of four classes as PNG files of 48 x 48 pixels, and 40 to test with; one of these is no image."""
    for split, count in (("train", 50), ("test", 10)):
        pictures, labels = read_digits(split)
        for name in ("0", "1", "2", "3"):
            for number, row in enumerate(np.flatnonzero(labels == int(name))[:count]):
                file = folder / split / f"digit {name}" / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                big = cv2.resize(pictures[row].squeeze(), (48, 48))
                cv2.imwrite(str(file), np.stack([big] * 3, -1))
    (folder / "test" / "digit 0" / "broken.png").write_bytes(b"no image")


@pytest.mark.slow
def test_the_five_commands_of_the_readme_lead_from_weights_and_a_folder_of_images_to_a_model_of_timm(tmp_path):
    images(tmp_path / "DIR")
    golden_weights.write(fixture("timm_vit_cls"), tmp_path / "WEIGHTS")
    inspect, train, predict, export, open_it = commands()
    assert [one.split()[1] for one in (inspect, train, predict, export)] == ["inspect", "train", "predict", "export"]
    quick = " --config.total_epochs=6 --config.model.dtype=float32 --config.model.image_size=32"
    quick += " --config.data.max_bad_fraction=0.1 --config.fake_devices=1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    for command in (inspect, train + quick, predict, export):
        words = [sys.executable, "-m", *shlex.split(command.replace("vit-dist", "vit_dist", 1))]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        # The broken file is named, and does not stop the rest.
        assert done.returncode == (2 if command == predict else 0), done.stderr[-2000:]
        assert command != predict or "1 of 41 files did not decode" in done.stderr
    with open(tmp_path / "answers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 41
    exported, run = load(tmp_path / "mine"), load(tmp_path / "runs" / "mine", step="best")
    assert exported.classes == run.classes == ("digit 0", "digit 1", "digit 2", "digit 3")
    pictures = sorted((tmp_path / "DIR" / "test").glob("*/[0-9].png"))
    found, expected = (one.model(np.stack([one.preprocess(file) for file in pictures])) for one in (exported, run))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    right = [int(file.parent.name[-1]) == row.argmax() for file, row in zip(pictures, expected, strict=True)]
    assert np.mean(right) > 0.5  # chance is a quarter
    if TIMM.exists():
        words = [str(TIMM), *shlex.split(open_it)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "VisionTransformer" in done.stdout, done.stderr[-2000:]

"""Classes of image files by name, from a run of the digits with two classes more than the digits have."""

import importlib
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

from vit_dist import evaluate, predict, recipes
from vit_dist.config import ConfigError
from vit_dist.data.sets.formats.idx import read_digits
from vit_dist.run.checkpoints import Checkpoints
from vit_dist.train import train

SMALLEST = Path(__file__).parent / "helpers" / "smallest.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of a few steps with an average, so that there are two sets of weights to choose from."""
    workdir = tmp_path_factory.mktemp("predict") / "run"
    long = ["total_steps=30", "log_every=30", "evaluate.every_steps=30", "checkpoint.every_steps=30"]
    rest = ["model.num_classes=12", "ema_decay=0.9", "optimizer.learning_rate=0.01", "batch_size=64"]
    train(recipes.load(SMALLEST, [*long, *rest]), workdir)
    return workdir


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> list[Path]:
    """The first twenty test digits as PNG files."""
    folder = tmp_path_factory.mktemp("digits")
    images, _ = read_digits("test")
    files = [folder / f"{number:02}.png" for number in range(20)]
    for file, image in zip(files, images, strict=False):
        cv2.imwrite(str(file), image)
    return files


def test_each_file_has_an_answer_and_classes_without_a_name_are_numbered(run, digits):
    found = predict(run, digits[:3], top=12)
    assert [one["file"] for one in found] == [str(file) for file in digits[:3]]
    for one in found:
        assert {choice["name"] for choice in one["classes"]} == {*"0123456789", "class 10", "class 11"}


def test_classes_of_one_name_are_told_apart(run, digits, monkeypatch):
    module = importlib.import_module("vit_dist.predict")
    monkeypatch.setattr(module, "class_names", lambda workdir: ("crane", "crane", *"23456789"))
    (found,) = predict(run, digits[:1], top=12)
    names = [choice["name"] for choice in found["classes"]]
    assert sorted(names) == sorted(["crane (0)", "crane (1)", *"23456789", "class 10", "class 11"])


def test_files_are_classified_as_evaluation_classifies_the_same_pixels(run, digits):
    images, labels = read_digits("test")
    names = [one["classes"][0]["name"] for one in predict(run, digits, top=1)]
    folder = run.parent / "all"
    folder.mkdir()
    files = [folder / f"{number}.png" for number in range(len(images))]
    for file, image in zip(files, images, strict=True):
        cv2.imwrite(str(file), image)
    every = [one["classes"][0]["name"] for one in predict(run, files, top=1)]
    assert every[:20] == names
    right = np.mean([int(name) == label for name, label in zip(every, labels, strict=True) if name.isdigit()])
    assert right == pytest.approx(evaluate(run)["top1"], abs=1e-6) and right > 0.15


def test_more_files_than_a_batch_and_another_mesh_change_nothing(run, digits):
    one = predict(run, digits, top=2)
    other = predict(run, digits, top=2, overrides=["mesh.data=-1", "evaluate.batch_size=8"])
    assert len(one) == len(other) == 20
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a["classes"], b["classes"], strict=True):
            assert x["probability"] == pytest.approx(y["probability"], abs=1e-5)


def test_files_of_any_size_format_and_colour_are_taken(run, tmp_path):
    color = np.random.default_rng(0).integers(0, 255, (37, 23, 3), np.uint8)
    files = [tmp_path / name for name in ("a.jpg", "b.png", "c.bmp", "d.webp")]
    for file in files:
        cv2.imwrite(str(file), color)
    found = predict(run, files, top=1)
    assert len(found) == 4
    assert found[1]["classes"] == found[2]["classes"]  # the two formats without loss


def test_a_step_and_the_best_can_be_asked_for(run, digits):
    newest = predict(run, digits[:1])
    assert predict(run, digits[:1], step=30) == newest == predict(run, digits[:1], best=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: None, "No such file or directory; give files that hold an image"),
        (lambda file: file.mkdir(), "Is a directory; give files that hold an image"),
        (lambda file: file.write_bytes(b""), "the file is empty; give files"),
        (lambda file: file.write_text("no image"), "no known image format; give files"),
    ],
)
def test_a_file_that_holds_no_image_is_refused_by_name_before_anything_is_computed(
    run, digits, tmp_path, monkeypatch, make, message
):
    monkeypatch.setattr(Checkpoints, "restore", lambda *_: pytest.fail("read the checkpoint"))
    make(tmp_path / "bad.png")
    with pytest.raises(ConfigError) as error:
        predict(run, [digits[0], tmp_path / "bad.png"])
    assert str(error.value).startswith(f"{tmp_path}/bad.png: {message}")


@pytest.mark.parametrize("top", [0, -1])
def test_no_classes_at_all_is_refused(run, digits, top):
    with pytest.raises(ConfigError, match=f"top: must be above 0, found {top}"):
        predict(run, digits, top=top)


def test_predicting_leaves_the_mesh_as_it_was(run, digits):
    predict(run, digits[:1])
    assert jax.sharding.get_mesh().empty

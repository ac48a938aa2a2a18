"""Classes of image files by name, from a run of the digits with two classes more than the digits have."""

import importlib
import os
import shutil
from pathlib import Path

import cv2
import golden_weights
import jax
import numpy as np
import pytest

from vit_dist import evaluate, load, predict, recipes
from vit_dist.config import ConfigError
from vit_dist.data.sets.formats.idx import read_digits
from vit_dist.data.stream.image_files import find_images, read_ahead
from vit_dist.overlays import Overlays, overlaid
from vit_dist.predict import predictions
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
    module = importlib.import_module("vit_dist.initial")
    monkeypatch.setattr(module.run_files, "class_names", lambda workdir: ("crane", "crane", *"23456789"))
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
    assert predict(run, digits[:1], step=30) == newest == predict(run, digits[:1], step="best")


@pytest.mark.parametrize(
    ("make", "path", "message"),
    [
        (lambda file: None, "bad.png", "No such file or directory; give files that hold an image"),
        (lambda file: file.mkdir(), "bad.png", "holds no image files; give files that hold an image"),
        (lambda file: file.write_text("no image"), "*.jpg", "matches no file; give files that hold an image"),
    ],
)
def test_a_path_without_files_is_refused_by_name_before_anything_is_computed(
    run, digits, tmp_path, monkeypatch, make, path, message
):
    monkeypatch.setattr(importlib.import_module("vit_dist.predict"), "opened", lambda *_: pytest.fail("read the run"))
    make(tmp_path / "bad.png")
    with pytest.raises(ConfigError) as error:
        predict(run, [digits[0], tmp_path / path])
    assert str(error.value) == f"{tmp_path}/{path}: {message}"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.write_bytes(b""), "the file is empty"),
        (lambda file: file.write_text("no image"), "no known image format"),
    ],
)
def test_a_file_that_does_not_decode_keeps_its_place_and_stops_no_other(run, digits, tmp_path, make, message, caplog):
    bad = tmp_path / "bad.txt"
    make(bad)
    found = predict(run, [*digits[:5], bad, *digits[5:]], overrides=["evaluate.batch_size=4"])
    assert found[5] == {"file": str(bad), "error": message}
    assert found[:5] + found[6:] == predict(run, digits, overrides=["evaluate.batch_size=4"])
    assert f"{bad}: {message}" in caplog.text
    assert predict(run, [bad, bad]) == [found[5]] * 2  # not a single one


def test_folders_and_patterns_stand_for_their_images_in_order(run, digits, tmp_path):
    for name in ("b/2.png", "b/1.PNG", "a/deep/3.png", ".hidden/4.png", "b/.5.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(digits[0], tmp_path / name)
    (tmp_path / "b/notes.txt").write_text("no image")

    def names(*paths):
        found = predict(run, [tmp_path / path for path in paths], top=1)
        return [one["file"].removeprefix(f"{tmp_path}/") for one in found]

    assert names(".") == ["a/deep/3.png", "b/1.PNG", "b/2.png"]
    assert names("b/2.png", "a") == ["b/2.png", "a/deep/3.png"]
    assert names("**/*.png") == ["a/deep/3.png", "b/2.png"]
    assert names("b*") == ["b/1.PNG", "b/2.png"]
    (tmp_path / "[1].png").write_bytes(digits[0].read_bytes())
    assert names("[1].png") == ["[1].png"]  # a file of that name is no pattern


def test_no_more_than_two_batches_of_images_are_held(run, digits, monkeypatch):
    module = importlib.import_module("vit_dist.predict")
    read, decode = [], module.evaluation_image

    def counted(*arguments, **options):
        read.append(1)
        return decode(*arguments, **options)

    monkeypatch.setattr(module, "evaluation_image", counted)
    found = predictions(run, digits * 3, overrides=["evaluate.batch_size=8"])
    for taken, _ in enumerate(found):
        assert len(read) <= 8 * (taken // 8 + 1) + 2 * 8
    assert len(read) == 60


def test_weights_of_others_classify_and_those_without_a_head_only_show_where_they_look(tmp_path):
    weights = golden_weights.write(golden_weights.fixture("timm_vit_cls"), tmp_path / "timm").parent
    file = tmp_path / "photo.png"
    cv2.imwrite(str(file), np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8))
    (found,) = predict(weights, [file], top=3)
    ((*expected,),) = load(weights).predict([file], top=3)
    assert [one["name"] for one in found["classes"]] == [name for name, _ in expected]
    assert [one["probability"] for one in found["classes"]] == pytest.approx([one for _, one in expected], rel=1e-5)
    without = {"model.num_classes": 0}
    with pytest.raises(ConfigError, match="predict: these weights have no head that classifies"):
        predict(weights, [file], overrides=without)
    assert not (tmp_path / "maps").exists()
    assert predict(weights, [file], attention=tmp_path / "maps", overrides=without) == [
        {"file": str(file), "classes": []}
    ]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["photo.last.png", "photo.rollout.png"]


def test_attention_is_drawn_over_each_image_and_brightest_where_the_map_is_largest(run, digits, tmp_path):
    bad, twin = tmp_path / "bad.png", tmp_path / "twin" / digits[0].name
    bad.write_text("no image")
    twin.parent.mkdir()
    shutil.copy(digits[1], twin)
    found = predict(run, [digits[0], bad, twin], attention=tmp_path / "maps")
    (alone,) = predict(run, digits[:1])
    for one, other in zip(found[0]["classes"], alone["classes"], strict=True):
        assert one["name"] == other["name"] and one["probability"] == pytest.approx(other["probability"], abs=1e-6)
    assert "error" in found[1]
    names = [f"{name}.{kind}.png" for name in ("00", "00.2") for kind in ("last", "rollout")]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == sorted(names)
    model = load(run)
    maps = model.attention_maps(np.stack([model.preprocess(file) for file in (digits[0], twin)]))
    for row, name in enumerate(("00", "00.2")):
        for kind in ("last", "rollout"):
            picture = cv2.imread(str(tmp_path / "maps" / f"{name}.{kind}.png"))[..., ::-1]
            assert picture.shape == (448, 448, 3)
            pixels = np.round(model.preprocess((digits[0], twin)[row]) * 127.5 + 127.5).astype(np.uint8)
            different = picture.astype(int) - overlaid(pixels, maps[kind][row])
            assert np.abs(different).max() <= 3  # a step of the colours
    assert np.abs(maps["last"][0] - maps["last"][1]).max() > 1e-4
    dark = np.zeros((8, 8, 1), np.uint8)
    drawn = overlaid(dark, np.array([[0.1, 0.2], [0.3, 0.9]])).mean(-1)
    corners = [drawn[y, x] for y in (20, 427) for x in (20, 427)]
    assert corners == sorted(corners) and corners[3] > 2 * corners[2]
    with pytest.raises(ConfigError, match="attention: .*maps: exists; remove it"):
        predict(run, digits[:1], attention=tmp_path / "maps")
    with pytest.raises(ConfigError, match="attention: .*: there is no folder"):
        predict(run, digits[:1], attention=tmp_path / "no" / "maps")
    with pytest.raises(ZeroDivisionError):
        for _ in predictions(run, digits[:1], attention=tmp_path / "stopped"):
            raise ZeroDivisionError
    assert not [path for path in tmp_path.iterdir() if "stopped" in path.name]


@pytest.mark.parametrize("top", [0, -1])
def test_no_classes_at_all_is_refused(run, digits, top):
    with pytest.raises(ConfigError, match=f"top: must be above 0, found {top}"):
        predict(run, digits, top=top)


def test_predicting_leaves_the_mesh_as_it_was(run, digits):
    predict(run, digits[:1])
    assert jax.sharding.get_mesh().empty


def test_images_behind_links_are_found_once_and_a_link_to_its_own_folder_ends_nothing(tmp_path):
    (tmp_path / "real" / "cats").mkdir(parents=True)
    for name in ("cats/a.jpg", "b.png"):
        (tmp_path / "real" / name).touch()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cats").symlink_to(tmp_path / "real" / "cats")
    (tmp_path / "linked" / "c.jpg").symlink_to(tmp_path / "real" / "b.png")
    (tmp_path / "linked" / "again").symlink_to(tmp_path / "linked")
    found = [path.relative_to(tmp_path).as_posix() for path in find_images([tmp_path / "linked"], "predict")]
    assert found == ["linked/c.jpg", "linked/cats/a.jpg"]


def test_maps_of_files_of_one_name_are_all_kept(tmp_path):
    pixels, maps = np.zeros((4, 4, 3), np.uint8), {"last": np.eye(2, dtype=np.float32)}
    with Overlays(tmp_path / "maps") as overlays:
        for file in ("x/a.jpg", "y/a.jpg", "z/a.2.jpg"):
            overlays.write(Path(file), pixels, maps)
    names = sorted(file.name for file in (tmp_path / "maps").iterdir())
    assert names == ["a.2.2.last.png", "a.2.last.png", "a.last.png"]


def test_maps_of_a_file_with_the_longest_name_are_kept(tmp_path):
    pixels, maps = np.zeros((4, 4, 3), np.uint8), {"rollout": np.eye(2, dtype=np.float32)}
    with Overlays(tmp_path / "maps") as overlays:
        for folder in ("x", "y"):
            overlays.write(Path(folder, "é" * 125 + ".jpg"), pixels, maps)
    names = sorted(file.name for file in (tmp_path / "maps").iterdir())
    assert names == ["é" * 100 + ".2.rollout.png", "é" * 100 + ".rollout.png"]


def test_a_pipe_has_an_error_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    ((_, found),) = read_ahead([tmp_path / "pipe.png"], lambda content: np.zeros(1), threads=1, ahead=1)
    assert found == "it is a pipe, device or folder and no file"

"""The training loop: what it saves and when, what it says, and what does not end it."""

import importlib
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image
from system import ROOT, checkpoint_steps, rows

from vit_dist import recipes
from vit_dist.config import ConfigError
from vit_dist.evaluate import Result
from vit_dist.plan import attached
from vit_dist.program import Program
from vit_dist.train import Diverged, train

loop = importlib.import_module("vit_dist.train")
SMALLEST = ROOT / "tests" / "helpers" / "smallest.py"
CLASSES, EMPTY = ("a", "b", "c"), 1  # the second has no examples in the tested split
PLAIN = ("evaluate.every_steps=0", "checkpoint.every_steps=0")


def settings(*overrides):
    return recipes.load(SMALLEST, overrides)


def labelled_images(count, classes):
    """`count` images [8, 8] and labels of these classes, in turn."""
    images = np.random.default_rng(count).integers(0, 256, (count, 8, 8), np.uint8)
    return images, np.array([classes[i % len(classes)] for i in range(count)])


def npz_without_a_class(folder):
    (train_images, train_labels), (images, labels) = labelled_images(48, (0, 1, 2)), labelled_images(16, (0, 2))
    np.savez(folder / "set.npz", x_train=train_images, y_train=train_labels, x_test=images, y_test=labels)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return ("data.source=npz", f"data.path={folder / 'set.npz'}"), 16


def files_of_which_a_class_does_not_decode(folder):
    for split, count in (("train", 48), ("test", 24)):
        for number, (image, label) in enumerate(zip(*labelled_images(count, (0, 1, 2)), strict=True)):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            path = folder / split / CLASSES[label] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"none" if split == "test" and label == EMPTY else file.getvalue())
    overrides = ("data.source=folder", f"data.path={folder}", "data.on_bad=skip", "data.max_bad_fraction=0.5")
    return overrides, 16


@pytest.mark.parametrize("made", [npz_without_a_class, files_of_which_a_class_does_not_decode])
def test_a_class_without_examples_in_the_tested_split_is_null_in_its_row_and_ends_nothing(made, tmp_path):
    overrides, count = made(tmp_path)
    summary = train(settings(*overrides, "model.num_classes=3"), tmp_path / "run")
    (row,) = [row for row in rows(tmp_path / "run") if row["split"] == "test"]
    assert row["class_top1"][EMPTY] is None and "non_finite" not in row
    assert all(0 <= row["class_top1"][other] <= 1 for other in (0, 2))
    assert row["count"] == summary["count"] == count
    assert checkpoint_steps(tmp_path / "run") == [2]


def test_a_tested_file_that_does_not_decode_ends_the_run_once_what_was_trained_is_saved(tmp_path):
    overrides, _ = files_of_which_a_class_does_not_decode(tmp_path / "set")
    wanted = settings(*overrides, "model.num_classes=3", "data.on_bad=error", "checkpoint.every_steps=0")
    with pytest.raises(ConfigError, match=r"test/b/1.png: no known image format \(and 7 more\); repair or remove it"):
        train(wanted, tmp_path / "run")
    assert checkpoint_steps(tmp_path / "run") == [2]
    assert [row["split"] for row in rows(tmp_path / "run")] == ["train", "train"]
    too_many = settings(*overrides, "model.num_classes=3", "data.max_bad_fraction=0.1")
    with pytest.raises(ConfigError, match="data.max_bad_fraction: 8 of 24 files did not decode"):
        train(too_many, tmp_path / "run")  # there is no step left, and so it is evaluated
    enough = settings(*overrides, "model.num_classes=3")
    assert train(enough, tmp_path / "run")["count"] == 16
    assert [row["step"] for row in rows(tmp_path / "run") if row["split"] == "test"] == [2]


def test_the_train_split_is_evaluated_under_a_name_of_its_own(tmp_path):
    summary = train(settings("evaluate.splits=[train]"), tmp_path)
    (row,) = [row for row in rows(tmp_path) if row["split"] == "train/evaluated"]
    assert summary["count"] == row["count"] == 1437 and summary["loss"] == row["loss"]
    (tmp_path / "summary.json").unlink()
    again = train(settings("evaluate.splits=[train]"), tmp_path)
    assert {**again, "seconds": 0} == {**summary, "seconds": 0}


@pytest.fixture
def measured(monkeypatch):
    """Evaluations that find, one after another, the accuracies in a list."""
    accuracies = []

    def evaluate_source(program, parameters, source):
        return Result(count=len(source), loss=1.0, top1=accuracies.pop(0), top5=1.0, class_top1={})

    monkeypatch.setattr(loop, "evaluate_source", evaluate_source)
    return accuracies


def test_the_best_is_saved_when_it_is_measured_however_seldom_checkpoints_are(measured, tmp_path, monkeypatch):
    saved, save = [], loop.Checkpoints.save
    monkeypatch.setattr(
        loop.Checkpoints,
        "save",
        lambda self, step, *trees, **more: saved.append(step) or save(self, step, *trees, **more),
    )
    measured += [0.5, 0.9, 0.7, 0.6]
    cadences = ("evaluate.every_steps=2", "checkpoint.every_steps=5", "checkpoint.keep_best=1", "total_steps=7")
    train(settings(*cadences), tmp_path)
    assert saved == [2, 4, 5, 7]  # a best, a better one, the cadence, the end; but not the third best at 6
    assert [row["top1"] for row in rows(tmp_path) if row["split"] == "test"] == [0.5, 0.9, 0.7, 0.6]
    assert checkpoint_steps(tmp_path) == [4, 7]


def test_keep_best_without_evaluations_keeps_the_newest_and_says_so(tmp_path, capsys):
    train(settings("evaluate.every_steps=0", "checkpoint.every_steps=1", "checkpoint.keep_best=2"), tmp_path)
    assert "nothing is evaluated, so checkpoint.keep_best has no effect" in capsys.readouterr().err
    assert checkpoint_steps(tmp_path) == [2]


@pytest.mark.parametrize("finished", [True, False])
def test_fewer_steps_than_a_run_has_done_are_refused_and_nothing_is_changed(finished, tmp_path):
    train(settings(), tmp_path)
    if not finished:
        (tmp_path / "summary.json").unlink()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ConfigError, match=r"total_steps: .* has done 2 steps, more than the 1 of this config"):
        train(settings("total_steps=1"), tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_a_plan_that_cannot_be_made_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    def plan_attached(*arguments):
        raise KeyError("network_ms")

    monkeypatch.setattr(attached, "plan_attached", plan_attached)
    assert train(settings(*PLAIN), tmp_path)["step"] == 2
    assert "no plan of this run can be made (KeyError: 'network_ms'); it goes on" in caplog.text


@pytest.mark.parametrize(("dtype", "times"), [("bfloat16", 1), ("float32", 0)])
def test_a_run_in_bfloat16_on_a_cpu_warns_once_that_float32_may_be_quicker(dtype, times, tmp_path, caplog):
    train(settings(f"model.dtype={dtype}", *PLAIN), tmp_path)
    assert caplog.text.count("bfloat16 may take longer than float32 on a CPU; compare by bench") == times


def test_a_run_prints_where_it_saves_and_where_its_profile_is(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    train(settings(*PLAIN, "checkpoint.every_steps=1", "profile.steps=1", "profile.start_step=1"), tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "saving" in line] == [
        f"saving step {step} to {tmp_path}/checkpoints" for step in (1, 2)
    ]
    assert f"the profile is in {tmp_path}/profile" in caplog.text


def test_a_profile_makes_the_loop_wait_where_it_begins_and_ends_alone(tmp_path, monkeypatch):
    waits = []
    block_until_ready = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waits.append(x) or block_until_ready(x))
    counts = []
    for profile in ((), ("profile.steps=3", "profile.start_step=4")):
        waits.clear()
        train(settings(*PLAIN, *profile, "total_steps=12", "log_every=100"), tmp_path / str(len(profile)))
        counts.append(len(waits))
    assert counts[1] == counts[0] + 2
    assert len(list((tmp_path / "2" / "profile").rglob("*.xplane.pb"))) == 1


def test_a_run_that_diverges_says_which_checkpoint_there_is(tmp_path, measured):
    diverging = ("optimizer.learning_rate=1e38", "log_every=1", "evaluate.every_steps=0")
    with pytest.raises(Diverged, match=r"step \d+: .*; nothing was saved yet; lower optimizer.learning_rate"):
        train(settings(*diverging, "total_steps=9", "checkpoint.every_steps=0"), tmp_path / "none")
    train(settings("evaluate.every_steps=0"), tmp_path / "some")
    config = json.loads((tmp_path / "some" / "config.json").read_text())
    config["optimizer"]["learning_rate"] = 1e38
    (tmp_path / "some" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Diverged, match=r"step \d+: .*; the last checkpoint is of step 2; lower"):
        train(settings(*diverging, "total_steps=9", "checkpoint.every_steps=0"), tmp_path / "some")


def test_a_mesh_that_leaves_devices_idle_says_so(caplog):
    Program(settings("mesh.data=2"), classes=10, steps=1, augment_on_device=True)
    assert caplog.messages == ["mesh: 6 of the 8 devices stay idle; set one axis to -1"]
    caplog.clear()
    Program(settings("mesh.data=2"), classes=10, steps=1, augment_on_device=True, devices=jax.devices()[:2])
    Program(settings("mesh.data=-1"), classes=10, steps=1, augment_on_device=True)
    assert caplog.messages == []


@pytest.mark.parametrize(("where", "found"), [("host", "host"), ("auto", "device")])
def test_the_log_says_what_crops_and_flips(where, found, tmp_path, capsys):
    train(settings(*PLAIN, "data.flip=true", f"data.augment_on={where}"), tmp_path)
    assert f"crop and flip on the {found} (data.augment_on={where})" in capsys.readouterr().err

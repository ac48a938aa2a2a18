"""Law 3: an evaluation counts every example of a split once, whatever the batch size and the mesh."""

import dataclasses
import importlib
import json

import numpy as np
import pytest
from system import DATA, NOTHING_RANDOM, rows, settings, train_here

from vit_dist import cli
from vit_dist.data.sets.formats.idx import read_digits
from vit_dist.data.stream.loader import evaluation_batches
from vit_dist.evaluate import evaluate, evaluate_source, open_split
from vit_dist.program import Program

MESHES = {
    "1 device": ("mesh.data=1",),
    "data=8": ("mesh.data=8",),
    "data=2 x fsdp=2 x tensor=2": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
}
DIGITS = 360  # every fifth of 1,797


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of a few steps, evaluated at its end; it keeps an average."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    train_here(folder, "mesh.data=8", "total_steps=12", "ema_decay=0.5", "evaluate.every_steps=12", *NOTHING_RANDOM)
    return folder


@pytest.fixture(scope="module")
def expected(workdir):
    """By a batch of 64 on the mesh that trained."""
    return evaluate(workdir)


def right(result):
    """How many examples were classified rightly: a whole number, by the counts."""
    count = result["top1"] * result["count"]
    assert count == pytest.approx(round(count), abs=1e-6)
    return round(count)


def test_eval_finds_what_the_end_of_training_found(workdir, expected):
    found = {row["split"]: row for row in rows(workdir) if row["split"] != "train"}
    assert list(found) == ["test", "test/ema"]
    for split, result in (("test/ema", expected), ("test", expected["parameters"])):
        result = {**result, "class_top1": list(result["class_top1"].values())}  # by name; in a row, in order
        assert found[split] == {
            "step": 12,
            "split": split,
            **{name: result[name] for name in found[split].keys() - {"step", "split"}},
        }
    assert found["test"]["loss"] != found["test/ema"]["loss"]
    assert (expected["split"], expected["step"], expected["count"]) == ("test", 12, DIGITS)
    assert 0.1 < expected["top1"] <= expected["top5"] < 1


@pytest.mark.parametrize("batch_size", [7, 100, 333])
@pytest.mark.parametrize("mesh", MESHES)
def test_all_360_digits_are_counted_at_batch_sizes_that_divide_nothing(mesh, batch_size, workdir, expected):
    found = evaluate(workdir, overrides=[*MESHES[mesh], f"evaluate.batch_size={batch_size}"])
    for result, same in ((found, expected), (found["parameters"], expected["parameters"])):
        assert result["count"] == DIGITS
        assert right(result) == right(same)
        assert result["top5"] == same["top5"]
        assert result["loss"] == pytest.approx(same["loss"], rel=1e-6)
    assert found["class_top1"] == expected["class_top1"]


def test_the_train_split_is_counted_whole_too(workdir):
    assert evaluate(workdir, split="train", overrides=["evaluate.batch_size=333"])["count"] == 1797 - DIGITS


def test_an_evaluation_that_misses_an_example_is_an_error(workdir, monkeypatch):
    def all_but_one(source, *arguments, **options):
        some = dataclasses.replace(source, images=source.images[1:], labels=source.labels[1:])
        return evaluation_batches(some, *arguments, **options)

    monkeypatch.setattr(importlib.import_module("vit_dist.evaluate"), "evaluation_batches", all_but_one)
    with pytest.raises(RuntimeError, match=f"evaluation counted {DIGITS - 1} examples of {DIGITS}, and skipped 0"):
        evaluate(workdir)


def test_accuracies_by_class_add_up_to_the_whole(expected):
    labels = np.bincount(read_digits("test")[1], minlength=10)
    assert labels.sum() == DIGITS
    assert list(expected["class_top1"]) == [str(digit) for digit in range(10)]
    by_class = [accuracy * count for accuracy, count in zip(expected["class_top1"].values(), labels, strict=True)]
    assert by_class == pytest.approx(np.round(by_class), abs=1e-4)
    assert sum(by_class) == pytest.approx(right(expected), abs=1e-3)


def test_classes_of_one_name_have_an_accuracy_each(workdir, expected, monkeypatch):
    def two_cranes(*arguments):
        return dataclasses.replace(open_split(*arguments), class_names=("crane", "crane", *"23456789"))

    monkeypatch.setattr(importlib.import_module("vit_dist.evaluate"), "open_split", two_cranes)
    found = evaluate(workdir)["class_top1"]
    assert list(found) == ["crane (0)", "crane (1)", *"23456789"]
    assert list(found.values()) == list(expected["class_top1"].values())


def test_the_eval_verb_prints_one_json_object(workdir, expected, capsys):
    assert cli.main(["eval", f"--workdir={workdir}", "--config.evaluate.batch_size=100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found)[:6] == ["split", "step", "count", "loss", "top1", "top5"]
    assert (found["count"], found["top1"]) == (DIGITS, expected["top1"])


@pytest.fixture(scope="module")
def cifar10():
    """(settings of a tiny model on CIFAR-10 in memory, its test split)."""
    path = DATA / "cifar10"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    asked = settings(
        "data.source=tar", f"data.path={path}", "data.in_memory=true", "model.channels=3",
        "model.image_size=32", "model.patch_size=8", "model.head_zero_init=false",
    )  # fmt: skip
    return asked, open_split(asked, "test")


def test_all_10_000_test_images_of_cifar10_are_counted_on_any_mesh(cifar10):
    asked, source = cifar10
    results = []
    for mesh in MESHES:
        axes = settings(*MESHES[mesh]).mesh
        evaluation = dataclasses.replace(asked.evaluate, batch_size=333)
        here = dataclasses.replace(asked, mesh=axes, evaluate=evaluation)
        program = Program(here, classes=10, steps=1, augment_on_device=True)
        with program.in_use():
            results.append(evaluate_source(program, program.new_state().parameters, source))
    assert len(source) == 10_000
    assert [result.count for result in results] == [10_000] * len(MESHES)
    assert len({round(result.top1 * result.count) for result in results}) == 1
    assert len({result.top5 for result in results}) == 1
    assert 0.05 < results[0].top1 < 0.3
    for result in results:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)
        by_class = list(result.class_top1.values())
        assert sum(by_class) / 10 == pytest.approx(result.top1, abs=1e-6)  # each class has 1,000 images

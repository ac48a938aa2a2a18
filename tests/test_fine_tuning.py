"""Runs that train a part of their parameters: one curve on any mesh, the same after a kill, opened as plain ones."""

import signal

import fine_tuning
import golden_weights
import jax
import numpy as np
import pytest
from golden_weights import fixture
from system import (
    DATA,
    NO_DROPOUT,
    assert_same_run,
    checkpoint_steps,
    command,
    largest_difference,
    losses,
    rows,
    run,
    saved_state,
    started,
    train_here,
    until,
)

from vit_dist import evaluate, load
from vit_dist.data.sets.formats.idx import read_digits

LORA = ("lora.rank=4", "lora.alpha=8", "model.head_zero_init=false")
PROBE = ("init.freeze=backbone",)
PARTS = {"lora": LORA, "probe": PROBE, "last block": ("init.freeze=all_but_last_1", "model.scan=false")}
MESHES = [("mesh.data=8",), ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")]


@pytest.mark.parametrize(
    "part", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("probe", "last block"))]
)
def test_the_curve_is_that_of_one_device_and_what_is_frozen_stays(part, tmp_path):
    common = (*PARTS[part], "total_steps=8", "ema_decay=0.9")
    expected = train_here(tmp_path / "one", "mesh.data=1", *common)
    for number, mesh in enumerate(MESHES):
        found = train_here(tmp_path / str(number), *mesh, *common)
        assert largest_difference(losses(found), losses(expected)) < 1e-4
    _, end = saved_state(tmp_path / "one", "mesh.data=1", *common)
    train_here(tmp_path / "start", "mesh.data=1", *common, "total_steps=1", "optimizer.learning_rate=0")
    _, start = saved_state(tmp_path / "start", "mesh.data=1", *common, "total_steps=1", "optimizer.learning_rate=0")
    names = [path for path in end if path.startswith("parameters/")]
    moved = {path.removeprefix("parameters/") for path in names if not np.array_equal(end[path], start[path])}
    if part == "lora":
        # Half of them, the first factors, begin to move when the second are no longer zero.
        assert moved == {path.removeprefix("parameters/") for path in names if "/lora/" in path or "/head/" in path}
    elif part == "probe":
        assert moved == {"head/kernel", "head/bias"}
    else:
        assert {path.split("/")[0] for path in moved} == {"blocks", "norm", "head"}
        assert not any(path.startswith("blocks/0/") for path in moved)
    for path in names:
        if path.removeprefix("parameters/") not in moved:
            np.testing.assert_array_equal(end[path.replace("parameters/", "ema/")], end[path])


@pytest.mark.slow
@pytest.mark.parametrize("part", ["lora", "probe"])
def test_a_run_that_trains_a_part_is_bitwise_the_same_after_a_kill(part, tmp_path):
    steps, every = 48, 20
    common = (*PARTS[part], "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", f"total_steps={steps}", "ema_decay=0.9",
              f"checkpoint.every_steps={every}")  # fmt: skip
    train_here(tmp_path / "whole", *common)
    killed = tmp_path / "killed"
    with started(command(killed, *common, "fake_devices=8"), tmp_path / "first") as running:
        until(
            lambda: checkpoint_steps(killed) and rows(killed)[-1]["step"] >= checkpoint_steps(killed)[-1] + 3, running
        )
        running.process.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL
    code, again = run(command(killed, *common, "fake_devices=8"), tmp_path / "again")
    assert code == 0 and "resuming from step" in again.said()
    assert_same_run(killed, tmp_path / "whole", steps, *common)


@pytest.fixture(scope="module")
def timm(tmp_path_factory):
    return golden_weights.write(fixture("timm_vit_cls"), tmp_path_factory.mktemp("timm")).parent


OPEN = (
    *(f"model.{key}=null" for key in ("width", "depth", "mlp", "heads", "patch_size")),
    *("model.pool=cls", "model.position_std=0.02", "model.image_size=224", *NO_DROPOUT),
)


@pytest.mark.parametrize("scan", ["true", "false"])
def test_adapters_start_from_the_weights_and_are_merged_where_a_run_is_opened(scan, timm, tmp_path):
    common = (*OPEN, "mesh.data=2", "mesh.fsdp=2", "batch_size=16", f"model.scan={scan}", f"init.weights={timm}",
              "evaluate.every_steps=3")  # fmt: skip
    tuned = tmp_path / "tuned"
    found = train_here(tuned, *common, "total_steps=3", "lora.rank=8", "lora.alpha=16", "optimizer.learning_rate=0.03")
    opened, start = load(tuned), load(timm)
    weights, before = (one._parameters["blocks"][1]["attention"]["qkv"]["kernel"] for one in (opened, start))
    assert not any("lora" in jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(opened._parameters))
    assert np.abs(np.asarray(weights) - np.asarray(before)).max() > 1e-3
    assert evaluate(tuned)["top1"] == [row["top1"] for row in found if row["split"] == "test"][-1]
    pictures, labels = digits()
    logits = opened.model(np.stack([opened.preprocess(picture) for picture in pictures]))
    # What `evaluate` measured with adapters beside the kernels, the merged kernels measure.
    assert np.mean(logits.argmax(1) == labels) == pytest.approx(evaluate(tuned)["top1"], abs=0.011)
    again = train_here(tmp_path / "further", *common[:-2], f"init.weights={tuned}", "total_steps=1", "lora.rank=2")
    assert np.isfinite(losses(again)).all()


def digits():
    images, labels = read_digits("test")
    return list(images), labels


CIFAR10 = DATA / "cifar10"


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_dir(), reason="no CIFAR-10 beside the checkout")
def test_a_few_images_of_new_classes_are_learnt_better_from_other_classes_than_from_scratch(tmp_path, monkeypatch):
    """The benchmark in small: four epochs on five classes, then 200 steps on 500 images of the other five."""
    monkeypatch.setitem(fine_tuning.COMMON, "fake_devices", 0)  # this process has its devices already
    monkeypatch.setitem(fine_tuning.COMMON, "mesh.data", 1)
    fine_tuning.first(CIFAR10, tmp_path, 4)
    start = {"init.weights": str(tmp_path / "first")}
    ways = {"tuned": (3e-3, start), "scratch": (1e-3, fine_tuning.SCRATCH)}  # each at the best of its rates
    found = {
        name: fine_tuning.other(CIFAR10, tmp_path / name, "finetune", rate, 0.02, 20, **changes)
        for name, (rate, changes) in ways.items()
    }
    print(found)
    assert found["tuned"] > found["scratch"] + 0.01 > 0.35

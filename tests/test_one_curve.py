"""Law 1: twenty steps with everything random on give one curve, on any mesh and however a batch is cut."""

import math

import cv2
import numpy as np
import pytest
from system import NO_DROPOUT, examples, largest_difference, losses, train_here

from vit_dist.data.sets.formats.idx import read_digits

TOLERANCE = 1e-4
MESHES = {
    "data=8": ("mesh.data=8",),
    "fsdp=8": ("mesh.data=1", "mesh.fsdp=8"),
    "tensor=2": ("mesh.data=1", "mesh.tensor=2"),
    "data=4 x tensor=2": ("mesh.data=4", "mesh.tensor=2"),
    "data=2 x fsdp=2 x tensor=2": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
}
ONE_DEVICE = ("mesh.data=1",)
ACCUMULATED = {
    "data=8": ("mesh.data=8", "accumulate_steps=4"),
    "data=2 x fsdp=2 x tensor=2, gathered once a step": (
        *MESHES["data=2 x fsdp=2 x tensor=2"],
        *("accumulate_steps=4", "accumulate_gather=step"),
    ),
    "data=2 x fsdp=2 x tensor=2, gathered once a micro-batch": (
        *MESHES["data=2 x fsdp=2 x tensor=2"],
        *("accumulate_steps=4", "accumulate_gather=microbatch"),
    ),
    "context=8": ("mesh.data=1", "mesh.context=8", "accumulate_steps=4"),
    "data=2 x fsdp=2 x context=2, gathered once a step": (
        *("mesh.data=2", "mesh.fsdp=2", "mesh.context=2", "accumulate_steps=4", "accumulate_gather=step"),
    ),
}

# Five tokens, which divide by no context; attention weights are never made there, and so not dropped either.
FIVE_TOKENS = ("model.registers=1", "model.attention_dropout=0")
SPLIT_TOKENS = {
    "context=8": ("mesh.data=1", "mesh.context=8"),
    "fsdp=2 x context=4": ("mesh.data=1", "mesh.fsdp=2", "mesh.context=4"),
    "data=2 x context=2 x tensor=2": ("mesh.data=2", "mesh.context=2", "mesh.tensor=2"),
    "context=4 x tensor=2, all to all": (
        *("mesh.data=1", "mesh.context=4", "mesh.tensor=2", "model.context_attention=all_to_all"),
    ),
}


# What published models are made of, in two models; the second row's class token is not pooled.
PUBLISHED = {
    "rope2d": (
        *("model.position=rope2d", "model.rope_jitter=1.2", "model.rope_rescale=2", "model.qk_norm=true"),
        *("model.qk_norm_bias=true", "model.embedding_norm=tokens", "model.pool=cls_mean", "model.pool_norm=both"),
        *("model.activation=quick_gelu", "model.heads=4"),
    ),
    "rmsnorm": (
        *("model.norm=rmsnorm", "model.embedding_norm=patches", "model.pool_norm=after", "model.class_token=true"),
        *("model.norm_epsilon=1e-5", "model.output_projection=24", "model.activation=swiglu"),
    ),
    "no norm at the end": ("model.pool_norm=none", "model.position=none", "model.class_token=true"),
}
PUBLISHED_MESHES = {
    "data=2 x fsdp=2 x tensor=2": MESHES["data=2 x fsdp=2 x tensor=2"],
    "fsdp=2 x context=2 x tensor=2": ("mesh.data=1", "mesh.fsdp=2", "mesh.context=2", "mesh.tensor=2"),
}


def names(cases, slow):
    """The cases to run; those in `slow`, whose axes other cases have too, in the slow suite."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in cases]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return train_here(tmp_path_factory.mktemp("one"), *ONE_DEVICE)


@pytest.fixture(scope="module")
def five_tokens(tmp_path_factory):
    return train_here(tmp_path_factory.mktemp("five_tokens"), *ONE_DEVICE, *FIVE_TOKENS)


@pytest.fixture(scope="module")
def no_dropout(tmp_path_factory):
    return train_here(tmp_path_factory.mktemp("no_dropout"), *ONE_DEVICE, *NO_DROPOUT)


@pytest.fixture(scope="module")
def pngs(tmp_path_factory):
    """200 digits as PNG files, to be decoded, cropped and flipped on the host; the loader knows no such pixels."""
    folder = tmp_path_factory.mktemp("pngs")
    images, labels = read_digits("train")
    for number, (image, label) in enumerate(zip(images[:200], labels[:200], strict=True)):
        path = folder / "train" / f"{label}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image)
    return (*NO_DROPOUT, "mixup=0", "cutmix=0", "data.source=folder", f"data.path={folder}")


def assert_same_curve(found, expected, record_property):
    difference = largest_difference(losses(found), losses(expected))
    record_property("largest_relative_difference", difference)
    print(f"largest relative difference of a loss: {difference:.1e}")
    assert len(losses(found)) == 20
    assert examples(found) == examples(expected)
    assert difference < TOLERANCE


def test_the_loss_is_finite_and_falls(one_device):
    curve = losses(one_device)
    assert all(math.isfinite(loss) for loss in curve)
    assert curve[0] == pytest.approx(math.log(10), abs=1e-5)  # the head starts at zero
    assert np.mean(curve[-5:]) < np.mean(curve[:5]) - 0.1


def test_every_step_sees_other_examples(one_device):
    assert len(set(examples(one_device))) == 20


@pytest.mark.parametrize("mesh", names(MESHES, slow={"tensor=2", "data=4 x tensor=2"}))
def test_the_curve_is_that_of_one_device(mesh, one_device, tmp_path, record_property):
    assert_same_curve(train_here(tmp_path, *MESHES[mesh]), one_device, record_property)


@pytest.mark.parametrize("mesh", names(SPLIT_TOKENS, slow={"fsdp=2 x context=4"}))
def test_the_curve_of_split_tokens_is_that_of_one_device(mesh, five_tokens, tmp_path, record_property):
    assert_same_curve(train_here(tmp_path, *SPLIT_TOKENS[mesh], *FIVE_TOKENS), five_tokens, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("model", PUBLISHED)
def test_the_curve_of_published_models_is_that_of_one_device(model, tmp_path, record_property):
    settings = ("model.attention_dropout=0", *PUBLISHED[model])
    one_device = train_here(tmp_path / "one", *ONE_DEVICE, *settings)
    for mesh, sizes in PUBLISHED_MESHES.items():
        assert_same_curve(train_here(tmp_path / mesh, *sizes, *settings), one_device, record_property)


@pytest.mark.parametrize("mesh", names(ACCUMULATED, slow={"data=8", "context=8"}))
def test_the_curve_of_four_micro_batches_is_that_of_one(mesh, no_dropout, tmp_path, record_property):
    assert_same_curve(train_here(tmp_path, *ACCUMULATED[mesh], *NO_DROPOUT), no_dropout, record_property)


def test_the_curve_of_files_decoded_on_the_host_is_the_same_on_two_meshes(pngs, tmp_path, record_property):
    meshes = ("fsdp=8", "data=2 x fsdp=2 x tensor=2")
    first, second = (train_here(tmp_path / mesh, *MESHES[mesh], *pngs) for mesh in meshes)
    assert_same_curve(first, second, record_property)

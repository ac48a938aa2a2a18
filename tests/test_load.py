"""`vit_dist.load`: a run of ours, or weights of others, to be used in a few lines."""

import json
import sys
from pathlib import Path

import golden_weights
import jax
import numpy as np
import pytest
from golden_weights import fixture
from PIL import Image
from system import train_here

import vit_dist
from vit_dist.config import ConfigError

# What the config.json of timm's fixture says of its images.
MEAN, STD = 0.5, 0.5
PREPROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 48, "width": 48}, "resample": 2,
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.25, 0.3],
}  # fmt: skip


@pytest.fixture(scope="module")
def timm(tmp_path_factory):
    return golden_weights.write(fixture("timm_vit_cls"), tmp_path_factory.mktemp("timm")).parent


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "one.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)).save(path)
    return path


def test_the_five_lines_of_the_readme_run(timm, picture, monkeypatch):
    section = (Path(__file__).parents[1] / "README.md").read_text().partition("## Weights of others")[2]
    lines = [
        line.removeprefix("    ") for line in section.partition("\n## ")[0].splitlines() if line.startswith("    ")
    ]
    lines = lines[:5]  # a command for the shell follows
    monkeypatch.chdir(picture.parent)
    names = {"timm/vit_base_patch16_224.augreg_in21k": str(timm), "photo.jpg": picture.name}
    code = "\n".join(lines)
    for name, own in names.items():
        code = code.replace(f'"{name}"', repr(own))
    found = {}
    exec(code, found)
    logits, features, (best,) = found["logits"], found["features"], found["best"]
    assert logits.shape == (1, 10) and features.shape == (1, 64)
    chances = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert [name for name, _ in best] == [f"class {index}" for index in np.argsort(-chances)[:3]]
    np.testing.assert_allclose([chance for _, chance in best], np.sort(chances)[::-1][:3], rtol=1e-5)


@pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}], ids=str)
def test_logits_are_those_of_timm_on_any_mesh(mesh, timm):
    golden = fixture("timm_vit_cls")
    model = vit_dist.load(timm, mesh)
    images = golden_weights.images(golden)  # two, which do not divide over eight devices
    expected = golden_weights.outputs(golden)
    np.testing.assert_allclose(model.model(images), expected["logits"], atol=1e-4 * expected["logits"].std())
    np.testing.assert_allclose(model.features(images), expected["features"], atol=1e-4 * expected["features"].std())


def test_pictures_are_taken_as_files_images_and_pixels(timm, picture):
    model = vit_dist.load(timm)
    image = Image.open(picture)
    from_file = model.preprocess(picture)
    assert from_file.dtype == np.float32 and from_file.shape == (48, 48, 3)
    for other in (str(picture), image, np.asarray(image)):
        np.testing.assert_array_equal(model.preprocess(other), from_file)
    gray = model.preprocess(image.convert("L"))
    np.testing.assert_array_equal(gray[..., 0], gray[..., 2])
    np.testing.assert_array_equal(gray, model.preprocess(np.asarray(image.convert("L"))))
    resized = np.asarray(image.resize((70, 53), Image.Resampling.BICUBIC))[2:50, 11:59]  # 48 / 0.9 = 53, its centre
    assert np.abs((from_file * STD + MEAN) * 255 - resized).max() <= 1 + 1e-3


def test_transformers_says_classes_and_how_images_are_prepared(tmp_path, picture):
    folder = golden_weights.write(fixture("hf_vit"), tmp_path).parent
    with pytest.raises(
        ConfigError, match=r"preprocessor_config.json is missing, .*; fetch it too, or set model.image_size, "
    ):
        vit_dist.load(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    model = vit_dist.load(folder)
    assert model.classes == tuple(f"LABEL_{number}" for number in range(10))
    pixels = np.asarray(Image.open(picture).resize((48, 48), Image.Resampling.BILINEAR)) / 255
    expected = (pixels - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
    np.testing.assert_allclose(model.preprocess(picture), expected, atol=1.01 / 255 / 0.2)


def test_another_image_size_is_asked_for_by_its_key(timm):
    model = vit_dist.load(timm, overrides={"model.image_size": 64})
    assert model.notes == ("position: resampled from 3x3 to 4x4 patches",)
    assert model.model(np.zeros((1, 64, 64, 3), np.float32)).shape == (1, 10)


def test_a_run_is_loaded_with_its_average_and_its_classes(tmp_path):
    train_here(tmp_path, "total_steps=3", "ema_decay=0.5", "mesh.data=2")
    run = next(path for path in (tmp_path, tmp_path / "run") if (path / "config.json").exists())
    model = vit_dist.load(run, {"data": 4})
    digit = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    file = tmp_path / "digit.png"
    Image.fromarray(digit).save(file)
    (expected,) = vit_dist.predict(run, [file])
    (found,) = model.predict([file])
    with pytest.raises(ConfigError, match="load: step: 2, but .* has saved 3; take one, newest or best"):
        vit_dist.load(run, step=2)
    np.testing.assert_allclose(vit_dist.load(run, step=3).predict([file])[0][0][1], found[0][1], rtol=1e-5)
    larger = vit_dist.load(run, overrides=["model.image_size=16"])
    assert larger.notes == ("position: resampled from 2x2 to 4x4 patches",)
    assert larger.model(np.zeros((1, 16, 16, 1), np.float32)).shape == (1, 10)
    assert [name for name, _ in found] == [one["name"] for one in expected["classes"]]
    np.testing.assert_allclose(
        [chance for _, chance in found], [one["probability"] for one in expected["classes"]], rtol=1e-4
    )


@pytest.mark.parametrize("mesh", [None, {"data": 2, "tensor": 2}], ids=str)
def test_attention_of_a_loaded_model_sums_to_one_and_its_maps_are_made_of_it(mesh, timm):
    model = vit_dist.load(timm, mesh)
    images = golden_weights.images(golden_weights.fixture("timm_vit_cls"))[[0, 1, 0]]
    weights, maps = model.attention(images), model.attention_maps(images)
    blocks, heads = model.settings.model.depth, model.settings.model.heads
    assert weights.shape == (3, blocks, heads, 10, 10) and weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(maps["last"], weights[:, -1].mean(1)[:, 0, 1:].reshape(3, 3, 3), atol=1e-6)
    np.testing.assert_allclose(weights[0], weights[2], atol=1e-6)
    product = np.eye(10)
    for block in weights[1].mean(1):
        product = (block + np.eye(10)) / 2 @ product
    np.testing.assert_allclose(maps["rollout"][1], product[0, 1:].reshape(3, 3), atol=1e-6)
    with pytest.raises(ConfigError, match=r"images: expected \[B, 48, 48, 3\]"):
        model.attention(np.zeros((1, 32, 32, 3), np.float32))


def test_many_images_are_run_a_batch_at_a_time(timm, monkeypatch):
    model, images = vit_dist.load(timm, {"data": 2}), np.random.default_rng(0).normal(size=(7, 48, 48, 3))
    whole = model.model(images.astype(np.float32))
    monkeypatch.setattr(sys.modules["vit_dist.load"], "BATCH", 2)
    np.testing.assert_allclose(model.model(images.astype(np.float32)), whole, rtol=1e-5, atol=1e-6)


def test_a_key_that_is_set_takes_the_place_of_what_the_weights_say(tmp_path):
    golden = fixture("hf_dinov2")
    golden["config"]["hidden_act"] = "relu"
    folder = golden_weights.write(golden, tmp_path).parent
    given = {"model.image_size": 48, "data.mean": 0.5, "data.std": 0.5, "data.interpolation": "bicubic"}
    given |= {"data.eval_crop": 1.0, "data.eval_crop_mode": "squash"}
    with pytest.raises(ConfigError, match="hidden_act is 'relu', expected .*; set model.activation"):
        vit_dist.load(folder, overrides=given)
    model = vit_dist.load(folder, overrides=given | {"model.activation": "gelu"})
    expected = golden_weights.outputs(golden)["features"]
    np.testing.assert_allclose(model.features(golden_weights.images(golden)), expected, atol=1e-4 * expected.std())


def test_what_cannot_be_loaded_or_used_is_said(timm, tmp_path, picture):
    with pytest.raises(ConfigError, match="load: there is no file or folder .*nothing-here"):
        vit_dist.load(tmp_path / "nothing-here")
    with pytest.raises(ConfigError, match="load: step: 3, but .* holds no run of ours"):
        vit_dist.load(timm, step=3)
    with pytest.raises(ConfigError, match="load: is empty"):
        vit_dist.load("")
    with pytest.raises(ConfigError, match="load: expected a folder, a file or a name, found int"):
        vit_dist.load(3)
    with pytest.raises(ConfigError, match="model.num_classes: 7, but .* has 10; leave it out"):
        vit_dist.load(timm, overrides={"model.num_classes": 7})
    model = vit_dist.load(timm, overrides={"model.num_classes": 0})
    with pytest.raises(ConfigError, match="these weights have no head"):
        model.predict([picture])
    with pytest.raises(ConfigError, match=r"picture: expected pixels uint8 .*, found \[4, 4, 3\] of float64"):
        model.preprocess(np.zeros((4, 4, 3)))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ConfigError, match="text.png: no known image format"):
        model.preprocess(tmp_path / "text.png")
    with pytest.raises(ConfigError, match=r"images: expected \[B, 48, 48, 3\]"):
        model.model(np.zeros((1, 32, 32, 3), np.float32))
    assert jax.device_count() == 8
    with pytest.raises(ConfigError, match="mesh: .* needs 16 devices, found 8"):
        vit_dist.load(timm, {"fsdp": 16})

"""What people give to a loaded model: pictures of every kind, one instead of several, meshes that cannot be."""

import os
from pathlib import Path
from typing import Any

import golden_weights
import numpy as np
import pytest
from PIL import Image

from vit_dist.config import ConfigError
from vit_dist.load import Loaded, load

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (60, 80, 3), np.uint8)
RGB = Image.fromarray(PIXELS)
GRAY_16 = Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257)
TRANSPARENT = RGB.convert("RGBA")
TRANSPARENT.putalpha(Image.fromarray(PIXELS[:, :, 1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_weights.write(golden_weights.fixture("timm_vit_cls"), tmp_path_factory.mktemp("weights")).parent


@pytest.fixture(scope="module")
def model(folder: Path) -> Loaded:
    return load(folder)


@pytest.mark.parametrize(
    "image",
    [RGB, TRANSPARENT, RGB.convert("L"), RGB.convert("LA"), RGB.convert("P"), RGB.convert("1"), GRAY_16],
    ids=lambda image: image.mode,
)
def test_an_image_in_memory_has_the_pixels_of_its_file(image: Image.Image, model: Loaded, tmp_path: Path) -> None:
    image.save(tmp_path / "image.png")
    expected = model.preprocess(tmp_path / "image.png")
    assert expected.shape == (48, 48, 3) and expected.dtype == np.float32
    np.testing.assert_array_equal(model.preprocess(image), expected)
    np.testing.assert_array_equal(model.preprocess(Image.open(tmp_path / "image.png")), expected)
    np.testing.assert_array_equal(model.preprocess(str(tmp_path / "image.png")), expected)


def test_a_photograph_that_says_how_it_was_held_is_upright(model: Loaded, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    RGB.save(tmp_path / "turned.png", exif=exif)
    turned = model.preprocess(Image.open(tmp_path / "turned.png"))
    np.testing.assert_array_equal(turned, model.preprocess(tmp_path / "turned.png"))
    np.testing.assert_array_equal(turned, model.preprocess(np.rot90(PIXELS, -1)))


def test_arrays_are_pixels_of_one_or_three_channels(model: Loaded) -> None:
    expected = model.preprocess(RGB)
    np.testing.assert_array_equal(model.preprocess(PIXELS), expected)
    gray = model.preprocess(RGB.convert("L"))
    for array in (np.asarray(RGB.convert("L")), np.asarray(RGB.convert("L"))[:, :, None]):
        np.testing.assert_array_equal(model.preprocess(array), gray)


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (PIXELS.astype(np.float32), r"expected pixels uint8 .H, W, 3. or .H, W, 1., found \[60, 80, 3\] of float32"),
        (PIXELS[None], r"found \[1, 60, 80, 3\]"),
        (PIXELS.transpose(2, 0, 1), r"found \[3, 60, 80\]"),
        (PIXELS[:, :, :2], r"found \[60, 80, 2\]"),
        (PIXELS[:0], r"found \[0, 80, 3\]"),
        (PIXELS[0, 0], r"found \[3\]"),
        (PIXELS.tolist(), "found list"),
        (None, "found NoneType"),
        (b"GIF89a", "found bytes"),
        (RGB.convert("F"), "32 bits"),
        ("nothing.png", "nothing.png: No such file"),
        ("/", "/: it is a pipe, device or folder"),
    ],
)
def test_what_is_no_picture_is_named(picture: Any, words: str, model: Loaded) -> None:
    with pytest.raises(ConfigError, match=words):
        model.preprocess(picture)


def test_a_damaged_image_is_named(model: Loaded, tmp_path: Path) -> None:
    RGB.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:9000])
    for picture in (tmp_path / "cut.png", Image.open(tmp_path / "cut.png")):
        with pytest.raises(ConfigError, match="truncated"):
            model.preprocess(picture)


def test_a_picture_that_is_no_file_is_neither_awaited_nor_read_forever(model: Loaded, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero", tmp_path):
        with pytest.raises(ConfigError, match=f"{path}: .*it is a pipe, device or folder .*; give files that"):
            model.preprocess(path)


def test_several_pictures_are_predicted_and_one_is_not_taken_for_several(model: Loaded, tmp_path: Path) -> None:
    RGB.save(tmp_path / "image.png")
    rows = model.predict([RGB, tmp_path / "image.png", PIXELS], top=3)
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 3
    assert model.predict(picture for picture in (RGB,)) == [model.predict([RGB])[0]]
    assert model.predict(PIXELS[None]) == model.predict([PIXELS])
    assert model.predict([]) == []
    everything = model.predict([RGB], top=100)[0]
    assert len(everything) == 10 and sum(chance for _, chance in everything) == pytest.approx(1)
    for one in (RGB, PIXELS, tmp_path / "image.png", str(tmp_path / "image.png")):
        with pytest.raises(ConfigError, match=r"predict: expected several pictures, found one; give .*\[picture\]"):
            model.predict(one)
    for top in (0, -1, "3"):
        with pytest.raises(ConfigError, match="predict: top is"):
            model.predict([RGB], top=top)


def test_a_mesh_changes_no_output(folder: Path, model: Loaded) -> None:
    images = np.stack([model.preprocess(PIXELS), model.preprocess(PIXELS[::-1]), model.preprocess(PIXELS[:, ::-1])])
    expected = model.model(images)
    for sizes in ({"fsdp": 2, "data": 2}, {"tensor": 2}):
        np.testing.assert_allclose(load(folder, mesh=sizes).model(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ({"foo": 2}, "unknown key mesh.foo"),
        ({"data": "x"}, "mesh.data: expected a whole number"),
        ({"data": 100}, "needs 100 devices, found 8"),
        ({"tensor": 3}, "model.heads: 4 does not divide over mesh.tensor=3"),
        ([2], "mesh: expected keys and values"),
    ],
)
def test_a_mesh_that_cannot_be_is_named(mesh: Any, words: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load(folder, mesh=mesh)

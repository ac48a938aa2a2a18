"""Colour operations, against Pillow and against arithmetic by hand."""

import colorsys
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vit_dist.data.pictures import color

SHAPES = [(37, 53), (53, 37), (1, 1), (1, 9), (9, 1), (2, 2)]
OPERATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "brightness": lambda image: color.brightness(image, 1.4),
    "contrast": lambda image: color.contrast(image, 1.4),
    "saturation": lambda image: color.saturation(image, 1.4),
    "turn_hue": lambda image: color.turn_hue(image, 0.3),
    "gray": color.gray,
    "sharpness": lambda image: color.sharpness(image, 1.9),
    "blur": lambda image: color.blur(image, 1.3),
    "invert": color.invert,
    "posterize": lambda image: color.posterize(image, 3),
    "solarize": lambda image: color.solarize(image, 128),
    "solarize_add": lambda image: color.solarize_add(image, 90),
    "auto_contrast": color.auto_contrast,
    "equalize": color.equalize,
}


def picture(shape: tuple[int, int], channels: int, low: int = 20, high: int = 230) -> np.ndarray:
    """Smooth patches and noise, with no pixel at either end of the range."""
    rng = np.random.default_rng(sum(shape) + channels)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    waves = [np.sin(rows / (3 + c) + c) + np.cos(columns / (5 + c)) for c in range(channels)]
    noisy = np.stack(waves, axis=-1) * 60 + rng.normal(120, 20, (*shape, channels))
    return noisy.clip(low, high).astype(np.uint8)


def with_pillow(image: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    done = np.asarray(change(Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])))
    return done.reshape(image.shape)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.55, 1.0, 1.45, 2.8])
@pytest.mark.parametrize(
    ("ours", "pillows"),
    [
        (color.brightness, ImageEnhance.Brightness),
        (color.contrast, ImageEnhance.Contrast),
        (color.saturation, ImageEnhance.Color),
        (color.sharpness, ImageEnhance.Sharpness),
    ],
    ids=["brightness", "contrast", "saturation", "sharpness"],
)
def test_blends_are_pillows(ours: Any, pillows: Any, factor: float) -> None:
    beyond = 1 if factor <= 1 else 2  # beyond the image, what Pillow rounded before the blend is scaled up by it
    for shape, channels in itertools.product(SHAPES, (1, 3)):
        image = picture(shape, channels)
        expected = with_pillow(image, lambda picture: pillows(picture).enhance(factor))
        assert difference(ours(image, factor), expected) <= beyond, (shape, channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_tables_are_pillows(shape: tuple[int, int], channels: int) -> None:
    image = picture(shape, channels)
    exact: list[tuple[np.ndarray, Callable[[Image.Image], Image.Image]]] = [
        (color.invert(image), ImageOps.invert),
        (color.equalize(image), ImageOps.equalize),
        *((color.posterize(image, bits), lambda it, n=bits: ImageOps.posterize(it, n)) for bits in range(1, 9)),
        *((color.solarize(image, at), lambda it, n=at: ImageOps.solarize(it, n)) for at in (0, 1, 77, 128, 255, 256)),
    ]
    for ours, pillows in exact:
        np.testing.assert_array_equal(ours, with_pillow(image, pillows))
    assert difference(color.auto_contrast(image), with_pillow(image, ImageOps.autocontrast)) <= 1
    assert difference(color.gray(image), with_pillow(image, lambda it: it.convert("L").convert(it.mode))) <= 1


def test_blends_by_hand() -> None:
    image = np.array([[[100, 50, 200], [10, 250, 0]]], np.uint8)
    assert color.brightness(image, 1.25).tolist() == [[[125, 62, 250], [12, 255, 0]]]  # 62.5 and 12.5 to even
    means = 55 * 0.299 + 150 * 0.587 + 100 * 0.114
    expected = [[[round(means + 0.5 * (x - means)) for x in pixel] for pixel in row] for row in image.tolist()]
    assert color.contrast(image, 0.5).tolist() == expected
    lumas = [round(r * 0.299 + g * 0.587 + b * 0.114) for r, g, b in image[0].tolist()]
    assert color.gray(image).tolist() == [[[luma] * 3 for luma in lumas]]
    assert color.saturation(image, 0.0).tolist() == color.gray(image).tolist()
    gray = np.array([[[0], [100], [200]]], np.uint8)
    assert color.contrast(gray, 2.0).ravel().tolist() == [0, 100, 255]
    assert color.saturation(gray, 2.0) is gray


def test_tables_by_hand() -> None:
    image = np.array([0, 100, 127, 128, 255], np.uint8).reshape(1, 5, 1)
    assert color.solarize_add(image, 50).ravel().tolist() == [50, 150, 177, 128, 255]
    assert color.solarize_add(image, 165).ravel().tolist() == [165, 255, 255, 128, 255]
    assert color.posterize(image, 0).ravel().tolist() == [0] * 5
    assert color.auto_contrast(np.array([[[50, 7], [60, 7], [70, 7]]], np.uint8)).tolist() == [
        [[0, 7], [128, 7], [255, 7]]
    ]


def test_sharpening_by_hand() -> None:
    image = np.full((5, 5, 1), 100, np.uint8)
    image[2, 2] = 152
    smooth = 100 + 52 * np.array([1, 5]) / 13  # beside it, and at it
    soft = color.sharpness(image, 0.0)[:, :, 0]
    assert soft[2, 2] == smooth[1] and soft[1, 1] == soft[2, 3] == smooth[0] and (soft[0] == 100).all()
    sharp = color.sharpness(image, 1.5)[:, :, 0]
    assert sharp[2, 2] == 1.5 * 152 - 0.5 * smooth[1] and sharp[2, 3] == 150 - 0.5 * smooth[0]


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.1, 1 / 3, 0.5])
def test_the_hue_is_turned_and_nothing_else(turn: float) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 64, 3), np.uint8)
    errors = []
    for before, after in zip(image.reshape(-1, 3), color.turn_hue(image, turn).reshape(-1, 3)):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
        wanted = colorsys.hsv_to_rgb((hue + round(256 * turn) / 256) % 1, saturation, value)
        errors.append(np.abs(after - 255 * np.array(wanted)).max())
    assert max(errors) < 9 and np.mean(errors) < 2  # of 255: a step of the hue moves a channel by up to 6


def test_a_turn_of_zero_or_of_the_full_circle_changes_nothing() -> None:
    image = picture((5, 6), 3)
    assert color.turn_hue(image, 0.0) is image
    assert color.turn_hue(image, 1.0) is image


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_gaussian(sigma: float) -> None:
    image = np.zeros((41, 41, 1), np.uint8)
    image[20, 20] = 255
    steps = np.arange(41) - 20
    kernel = np.exp(-(steps**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    assert difference(color.blur(image, sigma)[:, :, 0], 255 * np.outer(kernel, kernel)) <= 2  # OpenCV's is of integers
    flat = np.full((9, 9, 3), 77, np.uint8)
    assert (color.blur(flat, sigma) == 77).all()  # and no dark edge
    photo = picture((37, 53), 3)
    if sigma >= 0.5:  # Pillow blurs by boxes, a little differently below
        pillows = with_pillow(photo, lambda it: it.filter(ImageFilter.GaussianBlur(sigma)))
        assert np.abs(color.blur(photo, sigma).astype(int) - pillows).mean() < 1.5


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_every_operation_leaves_its_input_and_keeps_shape_and_type(
    operation: Callable[[np.ndarray], np.ndarray],
) -> None:
    for shape, channels in itertools.product(SHAPES, (1, 2, 3, 4, 6)):
        image = picture(shape, channels)
        expected = operation(image)
        assert expected.dtype == np.uint8 and expected.shape == image.shape
        frozen = image.copy()
        frozen.setflags(write=False)
        mirrored = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
        cut = np.pad(image, ((2, 3), (1, 4), (0, 0)))[2:-3, 1:-4]
        turned = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)
        for same in (frozen, mirrored, cut, turned):
            np.testing.assert_array_equal(operation(same), expected, err_msg=f"{shape}, {channels} channels")
            np.testing.assert_array_equal(same, image)


def test_jitter_factors_fill_their_range_evenly() -> None:
    image = np.full((1, 1, 1), 100, np.uint8)  # without colour or contrast, brightness is all there is
    rng = np.random.default_rng(0)
    factors = np.array([color.color_jitter(image, 0.4, 0.0, rng)[0, 0, 0] for _ in range(4000)]) / 100
    assert factors.min() == pytest.approx(0.6, abs=0.01) and factors.max() == pytest.approx(1.4, abs=0.01)
    counts, _ = np.histogram(factors, np.linspace(0.595, 1.405, 10))
    assert ((counts - 4000 / 9) ** 2 / (4000 / 9)).sum() < 26.1  # chi-square of 8 degrees, 0.1 %
    beyond = [color.color_jitter(image, 3.0, 0.0, rng)[0, 0, 0] for _ in range(200)]
    assert min(beyond) < 10 and max(beyond) == 255
    assert np.mean(np.array(beyond) == 0) < 0.02  # of 0 to 4; were negative factors drawn, a third would be black


def test_jitter_hues_fill_their_range_evenly() -> None:
    red = np.array([[[255, 0, 0]]], np.uint8)
    rng = np.random.default_rng(0)
    hues = [colorsys.rgb_to_hsv(*(color.color_jitter(red, 0.0, 0.1, rng)[0, 0] / 255))[0] for _ in range(2000)]
    turns = (np.array(hues) + 0.5) % 1 - 0.5
    assert -0.105 < turns.min() < -0.09 and 0.09 < turns.max() < 0.105 and abs(turns.mean()) < 0.005
    assert turns.std() == pytest.approx(0.2 / 12**0.5, rel=0.05)


def test_jitter_draws_its_order_for_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    orders: list[str] = []

    def noted(name: str) -> Callable[[np.ndarray, float], np.ndarray]:
        def change(image: np.ndarray, strength: float) -> np.ndarray:
            orders[-1] += name[0]
            return image

        return change

    for name in ("brightness", "contrast", "saturation", "turn_hue"):
        monkeypatch.setattr(color, name, noted(name))
    rng, image = np.random.default_rng(0), np.zeros((1, 1, 3), np.uint8)
    for _ in range(2400):
        orders.append("")
        color.color_jitter(image, 0.3, 0.1, rng)
    names, counts = np.unique(orders, return_counts=True)
    assert len(names) == 24 and all(sorted(name) == ["b", "c", "s", "t"] for name in names)
    assert ((counts - 100) ** 2 / 100).sum() < 49.7  # chi-square of 23 degrees, 0.1 %
    orders.append("")
    color.color_jitter(image, 0.0, 0.1, rng)
    assert orders[-1] == "t"

"""Resizing boxes of images."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
from peak import PEAK_BYTES
from PIL import Image

from vit_dist.data.pictures.resize import Box, Interpolation, resize


def _noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def _smooth(height: int, width: int) -> np.ndarray:
    """Detail of about eight pixels, so that methods differ by little."""
    coarse = Image.fromarray(_noise(height // 8, width // 8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _pillows(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)).astype(int)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (3, 40), (40, 3), (20, 30), (25, 31), (60, 90), (1, 1)])
def test_resize_keeps_shape_type_and_brightness(size: tuple[int, int], channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, channels), np.uint8)
    resized = resize(image, size)
    assert resized.shape == (*size, channels) and resized.dtype == np.uint8
    assert abs(resized.mean() - image.mean()) < 12
    assert np.array_equal(resize(np.full_like(image, 77), size), np.full((*size, channels), 77))


def test_shrinking_does_not_alias() -> None:
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255
    for height in (64, 100):  # one side stays, or grows
        for width in (16, 32):
            inside = resize(stripes, (height, width))[:, 1:-1]
            assert np.abs(inside.astype(int) - 127.5).max() <= 1


@pytest.mark.parametrize("shrink", [1.02, 1.07, 1.14, 1.3, 1.496, 1.504, 1.7, 2, 2.02, 2.5, 3, 3.6, 4, 4.1, 6])
def test_no_more_noise_is_left_than_the_mean_over_the_area_leaves(shrink: float) -> None:
    image, size = _noise(round(100 * shrink), round(120 * shrink)), (100, 120)
    means = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    assert resize(image, size).std() <= means.std()
    one_side = resize(image[:100], size)  # the other keeps its size
    assert one_side.std() <= cv2.resize(image[:100], size[::-1], interpolation=cv2.INTER_AREA).std()


@pytest.mark.parametrize("shrink", [0.6, 1, 1.05, 1.2, 1.496, 1.7, 2, 2.3, 2.6, 3.5, 5.2])
def test_bilinear_is_near_pillows(shrink: float) -> None:
    image = _smooth(240, 320)
    size = (round(240 / shrink), round(320 / shrink))
    difference = np.abs(resize(image, size) - _pillows(image, size))
    assert difference.mean() < (1 if shrink < 3 else 4) and difference.max() < 30
    assert shrink > 1 or difference.max() <= 1


def test_half_the_size_has_pillows_pixels() -> None:
    image = _noise(64, 96)
    difference = np.abs(resize(image, (32, 48)) - _pillows(image, (32, 48)))
    assert difference[1:-1, 1:-1].max() <= 2  # at the edge Pillow knows no pixel beyond, and we repeat the last


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shape", [(1, 1_000_000), (1_000_000, 1)])
def test_a_thin_image_takes_a_few_times_its_own_memory(shape: tuple[int, int], interpolation: Interpolation) -> None:
    code = PEAK_BYTES + (
        "import numpy as np; from vit_dist.data.pictures.resize import resize\n"
        f"image = np.full({(*shape, 3)}, 77, np.uint8); resize(image[:9, :9], (8, 8))\n"
        "before = peak_bytes()\n"
        f"assert (resize(image, (224, 224), {interpolation!r}) == 77).all()\n"
        "print(peak_bytes() - before)"
    )
    more = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # The image has 3 million bytes, and OpenCV's filter takes 75 beside it. Grown to 224 a side, it would have 672.
    assert int(more) < 120e6


def test_one_side_of_a_thin_image_shrinks_while_the_other_grows() -> None:
    ramp = np.repeat(np.arange(0, 240, dtype=np.uint8), 10)[None, :, None]  # 1 x 2400
    for thin in (ramp, np.repeat(ramp, 2, axis=0)):
        resized = resize(thin, (7, 24)).astype(int)
        assert np.abs(resized - resized[:1]).max() == 0
        assert np.abs(resized[0, :, 0] - (np.arange(24) * 10 + 4.5)).max() <= 1
        assert np.array_equal(resize(thin.transpose(1, 0, 2), (24, 7)), resized.transpose(1, 0, 2))


def test_a_side_of_any_length_is_resized() -> None:
    image = np.full((6, 70_000, 3), 77, np.uint8)
    for box in (None, (0, 0, 5.5, 69_999.5)):
        assert np.array_equal(resize(image, (4, 8), box=box), np.full((4, 8, 3), 77))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("box", [(0, 0, 40, 60), (3, 5, 30, 41), (7, 0, 8, 60)])
def test_bicubic_is_pillows(box: Box, channels: int) -> None:
    image = _noise(40, 60, channels)
    top, left, height, width = box
    for size in ((16, 24), (80, 90)):
        resized = resize(image, size, "bicubic", box)
        assert resized.shape == (*size, channels)
        for channel in range(channels):
            crop = Image.fromarray(image[top : top + height, left : left + width, channel])
            peer = crop.resize(size[::-1], Image.Resampling.BICUBIC)
            assert np.array_equal(resized[..., channel], np.asarray(peer))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_box_may_begin_between_pixels(interpolation: Interpolation) -> None:
    ramp = np.repeat(np.arange(0, 240, 4, dtype=np.uint8)[None, :, None], 20, axis=0)  # 4 a pixel, to the right
    for left in (10.0, 10.25, 10.5, 10.75):
        row = resize(ramp, (5, 10), interpolation, (2.5, left, 10.0, 20.0))[2, :, 0].astype(float)
        middles = left + 2 * np.arange(10) + 1  # of the new pixels, from the left edge
        assert np.abs(row - 4 * (middles - 0.5)).max() <= 1


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_box_is_its_crop(interpolation: Interpolation) -> None:
    image = _noise(40, 60)
    for box in ((0, 0, 40, 60), (3, 5, 30, 41), (39, 59, 1, 1)):
        top, left, height, width = box
        crop = image[top : top + height, left : left + width]
        assert np.array_equal(resize(image, (12, 14), interpolation, box), resize(crop, (12, 14), interpolation))
        assert np.array_equal(resize(image, (height, width), interpolation, box), crop)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_views_of_any_strides_are_resized(interpolation: Interpolation) -> None:
    image = _noise(30, 20)
    turned = image.transpose(1, 0, 2)[::-1, ::-1]
    for size in ((9, 11), (40, 50)):
        expected = resize(np.ascontiguousarray(turned), size, interpolation)
        assert np.array_equal(resize(turned, size, interpolation), expected)
    frozen = np.frombuffer(image.tobytes(), np.uint8).reshape(image.shape)
    assert np.array_equal(resize(frozen, (7, 8), interpolation), resize(image, (7, 8), interpolation))

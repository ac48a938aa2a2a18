"""Boxes of pixels to other sizes."""

import numpy as np
import pytest
from PIL import Image

from vit_dist.data.resize import Box, Interpolation, resize


def _noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def _smooth(height: int, width: int) -> np.ndarray:
    """Detail of about eight pixels, so that methods differ by little."""
    coarse = Image.fromarray(_noise(height // 8, width // 8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def _means(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mean over each new pixel's exact area, in floating point."""

    def shares(old: int, new: int) -> np.ndarray:
        edges = np.arange(new + 1) * old / new
        places = np.arange(old)
        covered = np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places)
        return covered.clip(0) * new / old

    rows, columns = shares(image.shape[0], size[0]), shares(image.shape[1], size[1])
    return np.einsum("ih,hwc,jw->ijc", rows, image.astype(float), columns, optimize=True)


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
    assert np.abs(resize(stripes, (64, 16)).astype(int) - 127.5).max() <= 1
    assert np.abs(resize(stripes, (100, 16)).astype(int) - 127.5).max() <= 1  # one side grows, the other shrinks


def test_whole_pixel_shrinking_is_the_mean() -> None:
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    means = image.reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(resize(image, (4, 4)) - means).max() <= 0.5


@pytest.mark.parametrize("shrink", [1.5, 1.7, 2, 2.3, 2.6, 3.5, 5.2])
def test_shrinking_is_within_a_grey_level_of_the_mean_over_the_area(shrink: float) -> None:
    image = _smooth(240, 320)
    size = (round(240 / shrink), round(320 / shrink))
    assert np.abs(resize(image, size) - _means(image, size)).mean() < 1.0


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

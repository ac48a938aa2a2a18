"""torchvision's resize in numpy; `tests/weights/test_preprocessing.py` compares its pixels with torchvision's."""

import numpy as np
import pytest
from PIL import Image

from vit_dist.data.pictures.resample import Part, resize_as_torchvision, resize_matrix
from vit_dist.data.pictures.resize import Interpolation, resize_by_pillow

SIZES = [((40, 60), (16, 24)), ((40, 60), (100, 33)), ((9, 7), (30, 30)), ((31, 200), (31, 20)), ((50, 50), (49, 51))]


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def whole(image: np.ndarray, size: tuple[int, int], interpolation: Interpolation) -> np.ndarray:
    return resize_as_torchvision(image, Part(size[0], 0, size[0]), Part(size[1], 0, size[1]), interpolation)


def across_then_down(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's bicubic, one direction at a time."""
    wide = Image.fromarray(image).resize((size[1], image.shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(wide.resize(size[::-1], Image.Resampling.BICUBIC))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_matrix_is_what_pillow_does_to_floats(interpolation: Interpolation) -> None:
    method = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    row = np.random.default_rng(0).normal(size=(1, 37)).astype(np.float32)
    for new in (1, 5, 36, 37, 38, 90):
        matrix = resize_matrix(37, new, interpolation)
        assert matrix.shape == (new, 37)
        np.testing.assert_allclose(matrix.sum(axis=1), 1)
        np.testing.assert_allclose(
            matrix @ row[0], np.asarray(Image.fromarray(row).resize((new, 1), method))[0], atol=1e-5
        )
    assert np.array_equal(resize_matrix(37, 37, interpolation), np.eye(37))


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_bicubic_goes_across_first_and_rounds_between(old: tuple[int, int], new: tuple[int, int]) -> None:
    image = noise(*old)
    difference = np.abs(whole(image, new, "bicubic").astype(int) - across_then_down(image, new))
    assert difference.max() <= 2 and difference.mean() < 0.05  # Pillow's weights have more bits than torchvision's


def test_bicubic_down_first_would_be_another_image() -> None:
    image = noise(40, 60)
    turned = whole(image.transpose(1, 0, 2), (90, 70), "bicubic").transpose(1, 0, 2)
    assert np.abs(turned.astype(int) - whole(image, (70, 90), "bicubic")).max() > 10


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_bilinear_is_rounded_once(old: tuple[int, int], new: tuple[int, int]) -> None:
    image = noise(*old)
    down, across = (resize_matrix(before, after, "bilinear") for before, after in zip(old, new, strict=True))
    exact = np.einsum("Hh,Ww,hwc->HWc", down, across, image.astype(np.float64))
    own = whole(image, new, "bilinear")
    assert np.abs(own - exact).max() <= 0.5 + 1e-9
    assert np.abs(own.astype(int) - resize_by_pillow(image, new, (0, 0, *old), "bilinear")).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_part_is_cut_out_of_the_whole(interpolation: Interpolation, channels: int) -> None:
    image = noise(45, 70, channels)
    for new in ((30, 41), (90, 200)):
        part = resize_as_torchvision(image, Part(new[0], 7, 20), Part(new[1], 11, 19), interpolation)
        assert part.dtype == np.uint8
        assert np.array_equal(part, whole(image, new, interpolation)[7:27, 11:30])


def test_a_side_of_more_pixels_than_fit_in_memory_is_never_made() -> None:
    image = np.full((1, 60_000, 3), 77, np.uint8)
    part = resize_as_torchvision(image, Part(200, 0, 200), Part(12_000_000, 5_999_900, 200), "bicubic")
    assert np.array_equal(part, np.full((200, 200, 3), 77))

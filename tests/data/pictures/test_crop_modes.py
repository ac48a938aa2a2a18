"""Where other libraries resize to, cut and fill; their pixels are in `tests/weights/test_preprocessing.py`."""

import numpy as np
import pytest
from PIL import Image

from vit_dist.data.pictures.crop_modes import CropMode, Rounding, Side, fill_levels, fit, place

FILL = np.array([10, 20, 30], np.uint8)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("image", "size", "mode", "ratio", "height", "width"),
    [
        # The long side is rounded down: 256 * 500 / 375 = 341.3.
        ((375, 500), (224, 224), "center", 0.875, Side(256, 16, 224, 0, 0), Side(341, 58, 224, 0, 0)),
        ((500, 375), (224, 224), "center", 0.875, Side(341, 58, 224, 0, 0), Side(256, 16, 224, 0, 0)),
        ((100, 100), (224, 224), "center", 0.9, Side(248, 12, 224, 0, 0), Side(248, 12, 224, 0, 0)),
        # An oblong size rounds to the nearest: 224 * 500 / 375 = 298.7.
        ((375, 500), (224, 160), "center", 1.0, Side(224, 0, 224, 0, 0), Side(299, 70, 160, 0, 0)),
        ((375, 500), (224, 224), "squash", 1.0, Side(224, 0, 224, 0, 0), Side(224, 0, 224, 0, 0)),
        ((375, 500), (224, 160), "squash", 0.7, Side(320, 48, 224, 0, 0), Side(228, 34, 160, 0, 0)),
        ((375, 500), (224, 224), "border", 1.0, Side(168, 0, 168, 28, 28), Side(224, 0, 224, 0, 0)),
        ((370, 501), (224, 224), "border", 1.0, Side(165, 0, 165, 29, 30), Side(224, 0, 224, 0, 0)),
        ((375, 500), (224, 224), "border", 0.8, Side(210, 0, 210, 7, 7), Side(280, 28, 224, 0, 0)),
        ((1, 9999), (224, 224), "border", 1.0, Side(1, 0, 1, 111, 112), Side(224, 0, 224, 0, 0)),
    ],
)
def test_sizes_are_rounded_as_in_timm(
    image: tuple[int, int], size: tuple[int, int], mode: CropMode, ratio: float, height: Side, width: Side
) -> None:
    assert place(image, size, mode, ratio, "timm") == (height, width)


@pytest.mark.parametrize(
    ("rounding", "cuts"), [("timm", [0, 1, 2, 2, 2, 3, 4]), ("transformers", [0, 1, 1, 2, 2, 3, 3])]
)
def test_half_a_pixel_to_cut_is_rounded_to_even_by_timm_and_down_by_transformers(
    rounding: Rounding, cuts: list[int]
) -> None:
    places = [place((10, 10 + more), (10, 10), "center", 1.0, rounding) for more in range(1, 8)]
    assert [width.cut for _, width in places] == cuts


@pytest.mark.parametrize("rounding", ["timm", "transformers"])
def test_a_border_is_filled_and_the_image_is_whole(rounding: Rounding) -> None:
    image = noise(30, 60)
    own = fit(image, (20, 20), "border", 1.0, rounding, "bilinear", FILL)
    assert (own[:5] == FILL).all() and (own[15:] == FILL).all()
    middle = np.asarray(Image.fromarray(image).resize((20, 10), Image.Resampling.BILINEAR))
    assert np.abs(own[5:15].astype(int) - middle).max() <= 1


def test_the_result_shares_no_memory_with_the_image() -> None:
    image = noise(20, 20)
    own = fit(image, (20, 20), "squash", 1.0, "timm", "bicubic", FILL)
    assert np.array_equal(own, image) and not np.may_share_memory(own, image)


def test_gray_images_keep_one_channel() -> None:
    gray = noise(30, 40)[..., :1]
    for rounding in ("timm", "transformers"):
        own = fit(gray, (20, 20), "center", 0.9, rounding, "bicubic", FILL[:1])
        three = fit(np.repeat(gray, 3, axis=2), (20, 20), "center", 0.9, rounding, "bicubic", FILL)
        assert own.shape == (20, 20, 1) and np.array_equal(np.repeat(own, 3, axis=2), three)


@pytest.mark.parametrize("shape", [(1, 65_500), (65_500, 1)])
def test_a_thin_image_is_cut_without_resizing_the_whole(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 77, np.uint8)  # of which the whole would be 224 x 14,672,000
    assert (fit(image, (224, 224), "center", 1.0, "timm", "bicubic", FILL) == 77).all()


def test_pixels_of_an_image_too_thin_to_be_resized_whole_are_nearly_pillows() -> None:
    image = noise(1, 300_000)  # the whole would be 8 x 2,400,000
    own = fit(image, (8, 8), "center", 1.0, "timm", "bilinear", FILL)
    around = Image.fromarray(image[:, 149_900:150_100]).resize((1600, 8), Image.Resampling.BILINEAR)
    assert np.abs(own.astype(int) - np.asarray(around)[:, 796:804]).max() <= 1


def test_the_mean_fills_in_grey_levels() -> None:
    assert fill_levels((0.485, 0.456, 0.406), 3).tolist() == [124, 116, 104]
    assert fill_levels(0.5, 1).tolist() == [128] and fill_levels(-1.0, 2).tolist() == [0, 0]
    assert fill_levels(1, 1).tolist() == [255]

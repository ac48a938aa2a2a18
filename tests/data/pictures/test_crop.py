"""Crops of an image, which the host and the device draw from the same distribution."""

import jax
import numpy as np
import pytest
from scipy import stats

from vit_dist import config
from vit_dist.data.pictures.augment import generator
from vit_dist.data.pictures.crop import centre_box, largest_box, random_crop
from vit_dist.step import augment

BOXES = [
    (86, 42, 140, 121),
    (72, 220, 246, 209),
    (20, 27, 348, 371),
]  # a run that a newer version resumes must see the same crops


def test_crops_have_the_given_area_and_aspect() -> None:
    height, width = 300, 400
    boxes = np.array([random_crop(height, width, (0.2, 0.6), (0.5, 2.0), generator(0, i)) for i in range(2000)])
    top, left, box_height, box_width = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + box_height <= height).all() and (left + box_width <= width).all()
    share, aspect = box_height * box_width / (height * width), box_width / box_height
    assert 0.19 < share.min() < 0.21 and 0.58 < share.max() < 0.61 and abs(share.mean() - 0.4) < 0.02
    assert 0.49 < aspect.min() < 0.55 and 1.85 < aspect.max() < 2.02
    assert abs(np.log(aspect).mean()) < 0.1


def test_where_no_box_fits_the_largest_centred_one_is_taken() -> None:
    assert random_crop(10, 100, (0.9, 1.0), (1.0, 1.0), generator(0, 0)) == (0, 45, 10, 10)
    assert random_crop(100, 10, (0.9, 1.0), (0.5, 1.0), generator(0, 0)) == (40, 0, 20, 10)


def test_a_crop_of_the_full_area_is_the_image_even_if_that_is_one_pixel() -> None:
    assert random_crop(32, 32, (1.0, 1.0), (1.0, 1.0), generator(0, 0)) == (0, 0, 32, 32)
    assert random_crop(1, 1, (0.05, 1.0), (3 / 4, 4 / 3), generator(0, 0)) == (0, 0, 1, 1)


def test_crops_are_those_of_earlier_versions() -> None:
    boxes = [random_crop(375, 500, (0.08, 1.0), (3 / 4, 4 / 3), generator(0, i)) for i in range(3)]
    assert boxes == BOXES


def test_the_centre_box_has_the_targets_shape() -> None:
    assert centre_box(100, 300, (40, 40), 0.8) == (10, 110, 80, 80)
    assert centre_box(100, 300, (40, 40), 1.0) == (0, 100, 100, 100)
    assert centre_box(100, 300, (10, 20), 1.0) == (0, 50, 100, 200)
    assert centre_box(300, 100, (20, 10), 0.5) == (100, 25, 100, 50)
    assert centre_box(1, 3, (8, 8), 0.1) == (0, 1, 1, 1)  # a box holds a pixel at least


def boxes_of_the_host(
    count: int, height: int, width: int, area: config.Interval, aspect: config.Interval
) -> np.ndarray:
    """`count` boxes [N, 4]: top, left, height, width."""
    return np.array([random_crop(height, width, area, aspect, generator(1, i)) for i in range(count)])


def boxes_of_the_device(
    count: int, height: int, width: int, area: config.Interval, aspect: config.Interval
) -> np.ndarray:
    """The same, read off the maps by which the device samples."""
    drawn = augment.draw(jax.random.key(1), (count, height, width), config.Data(crop_area=area, crop_aspect=aspect))
    assert drawn is not None
    matrix, offset = (np.asarray(array, np.float64) for array in drawn)
    box_height, box_width = matrix[:, 1, 1] * height, matrix[:, 0, 0] * width
    top = offset[:, 1] + (height - box_height) / 2
    left = offset[:, 0] + (width - box_width) / 2
    boxes = np.stack([top, left, box_height, box_width], axis=1)
    np.testing.assert_allclose(boxes, boxes.round(), atol=1e-3 * max(height, width) / 100)  # whole pixels
    return boxes.round().astype(int)


@pytest.mark.parametrize(
    ("height", "width", "area", "aspect"),
    [
        (375, 500, (0.08, 1.0), (3 / 4, 4 / 3)),  # a photograph: four boxes in ten do not fit at the first try
        (500, 100, (0.08, 1.0), (3 / 4, 4 / 3)),  # most do not, and some images have none in ten tries
        (8, 8, (0.3, 1.0), (3 / 4, 4 / 3)),  # few pixels, so that it counts how sides are rounded
        (32, 32, (0.05, 1.0), (1 / 2, 2.0)),
    ],
)
def test_the_device_draws_boxes_by_the_law_of_the_host(
    height: int, width: int, area: config.Interval, aspect: config.Interval
) -> None:
    host, device = (draw(8000, height, width, area, aspect) for draw in (boxes_of_the_host, boxes_of_the_device))
    assert (device[:, :2] >= 0).all()
    assert (device[:, 0] + device[:, 2] <= height).all() and (device[:, 1] + device[:, 3] <= width).all()
    shares = [boxes[:, 2] * boxes[:, 3] / (height * width) for boxes in (host, device)]
    assert shares[0].mean() == pytest.approx(shares[1].mean(), abs=0.015)
    largest = largest_box(height, width, aspect)
    same = [(boxes == largest).all(axis=1).mean() for boxes in (host, device)]
    assert same[0] == pytest.approx(same[1], abs=0.02)
    aspects = [boxes[:, 3] / boxes[:, 2] for boxes in (host, device)]
    for of_host, of_device in (shares, aspects, *((host[:, side], device[:, side]) for side in range(4))):
        assert stats.ks_2samp(of_host, of_device).statistic < 0.035  # 0.026 is exceeded by chance one time in a hundred


def test_the_mean_area_of_a_photograph_s_crops_is_torchvision_s() -> None:
    for draw in (boxes_of_the_host, boxes_of_the_device):
        boxes = draw(8000, 375, 500, (0.08, 1.0), (3 / 4, 4 / 3))
        # 0.4328: torchvision's rules, written out in NumPy and run 2 million times. Boxes cut to the image have 0.52.
        assert (boxes[:, 2] * boxes[:, 3]).mean() / (375 * 500) == pytest.approx(0.4328, abs=0.01)

"""Random crops and flips on the host."""

import math

import numpy as np

from vit_dist.data.augment import crop_box, generator, random_flip, random_resized_crop


def test_random_numbers_depend_on_seed_and_position_alone() -> None:
    draws = {(s, p): tuple(generator(s, p).random(4)) for p in (0, 1, 2**40) for s in (0, 1)}
    assert len(set(draws.values())) == 6
    assert draws[1, 2**40] == tuple(generator(1, 2**40).random(4))
    first = np.array([generator(0, position).random() for position in range(4000)])
    assert abs(first.mean() - 0.5) < 0.02 and abs(first.std() - math.sqrt(1 / 12)) < 0.01
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06


def test_crops_have_the_area_and_aspect_asked_for() -> None:
    height, width = 300, 400
    boxes = np.array([crop_box(height, width, (0.2, 0.6), (0.5, 2.0), generator(0, i)) for i in range(2000)])
    top, left, box_height, box_width = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + box_height <= height).all() and (left + box_width <= width).all()
    share, aspect = box_height * box_width / (height * width), box_width / box_height
    assert 0.19 < share.min() < 0.21 and 0.58 < share.max() < 0.61 and abs(share.mean() - 0.4) < 0.02
    assert 0.49 < aspect.min() < 0.55 and 1.85 < aspect.max() < 2.02
    assert abs(np.log(aspect).mean()) < 0.1


def test_where_no_box_fits_the_largest_centred_one_is_taken() -> None:
    assert crop_box(10, 100, (0.9, 1.0), (1.0, 1.0), generator(0, 0)) == (0, 45, 10, 10)
    assert crop_box(100, 10, (0.9, 1.0), (0.5, 1.0), generator(0, 0)) == (40, 0, 20, 10)


def test_a_crop_of_everything_is_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert np.array_equal(random_resized_crop(image, (32, 32), (1.0, 1.0), (1.0, 1.0), generator(0, 0)), image)


def test_a_crop_of_one_pixel_still_has_the_size() -> None:
    image = np.full((1, 1, 3), 9, np.uint8)
    assert (
        random_resized_crop(image, (4, 6), (0.05, 1.0), (3 / 4, 4 / 3), generator(0, 0)).tolist() == [[[9] * 3] * 6] * 4
    )


def test_one_image_in_two_is_flipped() -> None:
    image = np.arange(6, dtype=np.uint8).reshape(1, 6, 1)
    flipped = [random_flip(image, generator(0, i))[0, 0, 0] == 5 for i in range(10_000)]
    assert abs(np.mean(flipped) - 0.5) < 0.02

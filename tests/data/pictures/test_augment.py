"""Flips and the augmentations that follow them on the host."""

import math

import numpy as np
import pytest

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.pictures import color
from vit_dist.data.pictures.augment import (
    augment_image,
    generator,
    on_device,
    random_erase,
    random_flip,
    three_augment,
)
from vit_dist.data.pictures.randaugment import randaugment


def test_random_numbers_depend_on_seed_and_position_alone() -> None:
    draws = {(s, p): tuple(generator(s, p).random(4)) for p in (0, 1, 2**40) for s in (0, 1)}
    assert len(set(draws.values())) == 6
    assert draws[1, 2**40] == tuple(generator(1, 2**40).random(4))
    first = np.array([generator(0, position).random() for position in range(4000)])
    assert abs(first.mean() - 0.5) < 0.02 and abs(first.std() - math.sqrt(1 / 12)) < 0.01
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06


def test_one_image_in_two_is_flipped() -> None:
    image = np.arange(6, dtype=np.uint8).reshape(1, 6, 1)
    flipped = [random_flip(image, generator(0, i))[0, 0, 0] == 5 for i in range(10_000)]
    assert abs(np.mean(flipped) - 0.5) < 0.02


def test_a_generator_is_philox_with_the_seed_as_key_and_the_position_as_counter() -> None:
    for seed, position in ((0, 0), (7, 2**40), (2**32 - 1, 2**63)):
        plain = np.random.Generator(np.random.Philox(key=seed, counter=[0, position, 0, 0]))
        np.testing.assert_array_equal(generator(seed, position).integers(0, 2**63, 9), plain.integers(0, 2**63, 9))
    first, second = generator(1, 1), generator(1, 2)
    second.random()
    assert first.random() == generator(1, 1).random()  # they share nothing


def test_a_flipped_image_is_its_mirror_image_in_every_layout() -> None:
    for shape in ((3, 5, 1), (1, 1, 3), (4, 2, 6)):
        image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
        image.setflags(write=False)
        results = {random_flip(image, generator(0, i)).tobytes() for i in range(20)}
        assert results == {image.tobytes(), image[:, ::-1].tobytes()}


def test_three_augment_is_one_of_three_evenly() -> None:
    image = np.zeros((9, 9, 3), np.uint8)
    image[4, 4] = 250, 100, 200
    gray, solarised = color.gray(image).tobytes(), color.solarize(image, 128).tobytes()
    counts, blurred = np.zeros(3, int), []
    for i in range(3000):
        changed = three_augment(image, generator(0, i))
        choice = 0 if changed.tobytes() == gray else 1 if changed.tobytes() == solarised else 2
        counts[choice] += 1
        if choice == 2:
            blurred.append(int(changed[4, 4, 0]))
    assert ((counts - 1000) ** 2 / 1000).sum() < 13.8  # chi-square of 2 degrees, 0.1 %
    strongest, weakest = color.blur(image, 2.0)[4, 4, 0], color.blur(image, 0.1)[4, 4, 0]
    assert min(blurred) == pytest.approx(strongest, abs=1) and max(blurred) == weakest == 250


def test_an_erased_box_has_the_area_aspect_and_noise_of_the_paper_and_timm() -> None:
    areas, aspects, centres = [], [], []
    values = np.zeros(256, int)
    for i in range(2000):
        erased = random_erase(np.full((60, 90, 1), 7, np.uint8), 1.0, generator(0, i))[:, :, 0]
        rows, columns = np.nonzero(erased != 7)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        areas.append(height * width / 5400)
        aspects.append(width / height)
        centres.append(((rows.min() + rows.max()) / 118, (columns.min() + columns.max()) / 178))
        values += np.bincount(erased[rows, columns], minlength=256)
    assert 0.015 < min(areas) < 0.025 and 0.31 < max(areas) < 0.345 and np.mean(areas) == pytest.approx(0.172, abs=0.01)
    assert 0.27 < min(aspects) < 0.33 and 3.0 < max(aspects) < 3.7
    assert np.mean(centres, axis=0) == pytest.approx([0.5, 0.5], abs=0.02)
    mean = (values * np.arange(256)).sum() / values.sum()
    assert mean == pytest.approx(128, abs=1)
    assert ((values * (np.arange(256) - mean) ** 2).sum() / values.sum()) ** 0.5 == pytest.approx(61.4, abs=1)
    assert values[0] / values.sum() == pytest.approx(0.023, abs=0.004)  # two deviations down, cut off
    assert values[64:193].sum() / values.sum() == pytest.approx(0.683, abs=0.01)  # within one


def test_each_value_of_an_erased_box_is_drawn_independently() -> None:
    erased = random_erase(np.zeros((400, 400, 3), np.uint8), 1.0, generator(0, 0))
    rows, columns = np.nonzero(erased.any(axis=2))
    box = erased[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(float)
    for a, b in ((box[1:], box[:-1]), (box[:, 1:], box[:, :-1]), (box[:, :, 0], box[:, :, 2])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.05


def test_an_image_is_erased_with_the_given_probability() -> None:
    image = np.full((16, 16, 1), 7, np.uint8)
    for probability in (0.0, 0.25, 1.0):
        share = np.mean([random_erase(image, probability, generator(0, i)) is not image for i in range(2000)])
        assert share == pytest.approx(probability, abs=0.03)
    assert (image == 7).all()
    pixel = np.full((1, 1, 3), 7, np.uint8)
    assert random_erase(pixel, 1.0, generator(0, 0)) is pixel  # no box of a third of it


EVERYTHING = config.Data(
    flip=True,
    three_augment=True,
    randaugment_layers=2,
    randaugment_magnitude=15.0,
    randaugment_std=0.5,
    color_jitter=0.3,
    hue_jitter=0.1,
    erase=0.5,
)


@pytest.mark.parametrize("shape", [(24, 40, 3), (40, 24, 1), (1, 1, 3), (1, 1, 1), (2, 9, 3), (16, 16, 2)])
def test_augmentations_depend_on_the_image_and_the_generator_alone(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    frozen = image.copy()
    frozen.setflags(write=False)
    mirrored = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    results = set()
    for i in range(60):
        first, *others = (augment_image(it, EVERYTHING, generator(5, i)) for it in (image, image, frozen, mirrored))
        assert first.shape == shape and first.dtype == np.uint8
        assert all(np.array_equal(first, other) for other in others)
        np.testing.assert_array_equal(image, frozen)
        results.add(first.tobytes())
    assert len(results) > (50 if image.size > 30 else 10)


def test_augmentations_come_in_the_order_of_published_recipes() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    for i in range(30):
        rng = generator(0, i)
        expected = random_flip(image, rng)
        expected = three_augment(expected, rng)
        expected = randaugment(expected, 2, 15.0, 0.5, rng)
        expected = color.color_jitter(expected, 0.3, 0.1, rng)
        expected = random_erase(expected, 0.5, rng)
        np.testing.assert_array_equal(augment_image(image, EVERYTHING, generator(0, i)), expected)


@pytest.mark.parametrize("key", ["flip", "three_augment", "randaugment_layers", "color_jitter", "hue_jitter", "erase"])
def test_each_augmentation_works_without_the_others(key: str) -> None:
    data = config.Data(**{key: {"flip": True, "three_augment": True, "randaugment_layers": 1}.get(key, 0.4)})
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    assert any((augment_image(image, data, generator(0, i)) != image).any() for i in range(20))


def test_without_augmentations_the_image_is_unchanged_and_no_number_is_drawn() -> None:
    image, rng = np.zeros((4, 4, 3), np.uint8), generator(0, 0)
    assert augment_image(image, config.Data(), rng) is image
    assert rng.random() == generator(0, 0).random()


def test_the_device_crops_and_flips_images_in_memory_that_need_no_augmentation_of_the_host() -> None:
    plain = {"flip": True, "crop_area": (0.1, 1.0), "shift": 0.1, "randaugment_magnitude": 15.0}
    assert on_device(config.Data(**plain), in_memory=True)
    assert not on_device(config.Data(**plain), in_memory=False)
    assert not on_device(config.Data(**plain, augment_on="host"), in_memory=True)
    assert on_device(config.Data(**plain, augment_on="device"), in_memory=True)
    for keys in ({"three_augment": True}, {"randaugment_layers": 1}, {"color_jitter": 0.1}, {"hue_jitter": 0.1}):
        assert not on_device(config.Data(**keys), in_memory=True)
    assert not on_device(config.Data(erase=0.1), in_memory=True)


def test_the_device_refuses_augmentations_of_the_host_and_files() -> None:
    with pytest.raises(ConfigError, match=r"data.augment_on: device, but data.erase is done by the host alone"):
        on_device(config.Data(augment_on="device", erase=0.1), in_memory=True)
    with pytest.raises(ConfigError, match=r"data.augment_on: device, but the images are files"):
        on_device(config.Data(augment_on="device"), in_memory=False)

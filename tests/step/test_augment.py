"""Warps and mixes: known maps, exact shares, and the same numbers on every mesh."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from PIL import Image
from scipy import stats

from vit_dist import config
from vit_dist.mesh import layout
from vit_dist.step import augment

RNG = np.random.default_rng(0)
IMAGES: Any = RNG.integers(0, 256, (16, 12, 10, 3), dtype=np.uint8)
TARGETS: Any = np.eye(10, dtype=np.float32)[RNG.integers(0, 10, 16)]
EVERYTHING = config.Data(crop_area=(0.3, 1.0), flip=True, shift=0.1, rotate=20, scale=0.2, shear=10)
IDENTITY = np.eye(2, dtype=np.float32)


def meshes() -> list[Mesh]:
    def make(**sizes: int) -> Mesh:
        count = int(np.prod(list(sizes.values())))
        explicit = (AxisType.Explicit,) * len(sizes)
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=explicit, devices=jax.devices()[:count])

    return [make(data=1), make(data=8), make(data=2, fsdp=2, tensor=2)]


def on_every_mesh(function: Callable[..., Any], *arrays: np.ndarray) -> list[Any]:
    """The jitted function's results under each mesh; the batch is split, the key is not."""
    results = []
    for mesh in meshes():
        with jax.set_mesh(mesh):
            rows = NamedSharding(mesh, layout.spec("batch") or PartitionSpec())
            split = [jax.device_put(array, rows) for array in arrays]
            results.append(jax.jit(function)(*split, jax.random.key(5)))
            for leaf in jax.tree.leaves(results[-1]):
                assert leaf.sharding.spec[0] == rows.spec[0]
    return results


def sampled(image: Any, matrix: Any, offset: Any = (0.0, 0.0)) -> np.ndarray:
    """One image [H, W] under one map."""
    return np.asarray(
        augment.sample(image[None, :, :, None], jnp.asarray([matrix], jnp.float32), jnp.asarray([offset], jnp.float32))
    )[0, :, :, 0]


@pytest.mark.parametrize("repeats", [1, 3])  # on 8 devices of two rows, partners of 3 repeats are on two devices
def test_warps_and_mixes_are_the_same_on_every_mesh(repeats: int) -> None:
    def pipeline(images: jax.Array, targets: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = augment.resize(augment.normalise(images, (0.1, 0.2, 0.3), 0.5), (14, 9), "bilinear")
        images = augment.warp(images, key, EVERYTHING)
        return augment.mix(images, targets, key, mixup=0.4, cutmix=1.0, repeats=repeats)

    first, *others = on_every_mesh(pipeline, IMAGES, TARGETS)
    for other in others:
        for expected, array in zip(first, other, strict=True):
            np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-6)


def test_normalise_scales_bytes_by_one_number_or_one_for_each_channel() -> None:
    np.testing.assert_allclose(
        augment.normalise(IMAGES, 0.5, 0.25), (IMAGES / 255.0 - 0.5) / 0.25, rtol=1e-5, atol=1e-5
    )
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    expected = (IMAGES / 255 - np.array(mean)) / np.array(std)
    result = augment.normalise(IMAGES, mean, std, "bfloat16")
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(np.float32), expected, rtol=1e-2, atol=1e-2)


def test_resize_keeps_a_ramp_and_averages_when_it_shrinks() -> None:
    ramp: Any = np.broadcast_to(np.arange(8, dtype=np.float32)[None, None, :, None], (1, 4, 8, 1))
    larger = augment.resize(ramp, (8, 16), "bilinear")
    np.testing.assert_allclose(larger[0, 3, 1:-1, 0], (np.arange(14) + 0.5) / 2, rtol=1e-6)
    checkers = np.indices((16, 16)).sum(0)[None, :, :, None] % 2
    smaller = augment.resize(checkers, (4, 4), "bilinear")
    np.testing.assert_allclose(smaller, 0.5, atol=0.02)  # without antialiasing it would be 0 or 1
    np.testing.assert_array_equal(augment.resize(IMAGES, (12, 10), "bicubic"), IMAGES)


@pytest.mark.parametrize("size", [(5, 7), (20, 31)])
def test_resize_agrees_with_pillow(size: tuple[int, int]) -> None:
    for name, method in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        resized = augment.resize(IMAGES[:1], size, name)[0, :, :, 0]
        expected = Image.fromarray(np.asarray(IMAGES[0, :, :, 0], np.float32)).resize(size[::-1], method)
        np.testing.assert_allclose(resized, np.asarray(expected), atol=0.05)


def test_with_every_augmentation_off_no_number_is_drawn_and_nothing_changes() -> None:
    key = jax.random.key(0)
    assert augment.draw(key, (16, 12, 10), config.Data()) is None
    np.testing.assert_array_equal(augment.warp(IMAGES, key, config.Data()), IMAGES)
    images, targets = augment.mix(IMAGES, TARGETS, key)
    assert images is IMAGES and targets is TARGETS


def test_the_identity_map_returns_the_image() -> None:
    maps: Any = np.broadcast_to(IDENTITY, (16, 2, 2)), np.zeros((16, 2), np.float32)
    np.testing.assert_array_equal(augment.sample(IMAGES, *maps), IMAGES)
    tiny = config.Data(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0), shift=1e-9)
    square = IMAGES[:, :10]
    np.testing.assert_allclose(augment.warp(square, jax.random.key(0), tiny), square, atol=1e-3)


def test_quarter_turns_flips_and_whole_shifts_are_exact() -> None:
    image = RNG.normal(size=(7, 7)).astype(np.float32)
    np.testing.assert_allclose(sampled(image, [[0, -1], [1, 0]]), np.rot90(image, 1), atol=1e-6)
    np.testing.assert_allclose(sampled(image, [[0, 1], [-1, 0]]), np.rot90(image, -1), atol=1e-6)
    np.testing.assert_allclose(sampled(image, [[-1, 0], [0, 1]]), image[:, ::-1], atol=1e-6)
    shifted = sampled(image, IDENTITY, (-2.0, 1.0))  # reads 2 to the left and 1 below
    np.testing.assert_allclose(shifted[:-1, 2:], image[1:, :-2], atol=1e-6)
    np.testing.assert_allclose(shifted[:-1, 1], image[1:, 0], atol=1e-6)  # beyond the edge: the nearest pixel
    half = sampled(image, IDENTITY, (0.5, 0.0))
    np.testing.assert_allclose(half[:, :-1], (image[:, :-1] + image[:, 1:]) / 2, atol=1e-6)
    one_row = RNG.normal(size=(1, 5)).astype(np.float32)
    np.testing.assert_allclose(sampled(one_row, [[-1, 0], [0, 1]]), one_row[:, ::-1], atol=1e-6)


def test_flip_mirrors_about_half_of_the_images_and_leaves_the_others() -> None:
    images: Any = RNG.normal(size=(400, 5, 6, 1)).astype(np.float32)
    warped = np.asarray(augment.warp(images, jax.random.key(1), config.Data(flip=True)))
    mirrored = np.isclose(warped, images[:, :, ::-1], atol=1e-5).all((1, 2, 3))
    kept = np.isclose(warped, images, atol=1e-5).all((1, 2, 3))
    assert (mirrored ^ kept).all()
    assert 160 < mirrored.sum() < 240


def test_every_warp_fills_the_configured_range_and_stays_within_it() -> None:
    def maps(**data: Any) -> tuple[np.ndarray, np.ndarray]:
        drawn = augment.draw(jax.random.key(2), (2000, 20, 40), config.Data(**data))
        assert drawn is not None
        return np.asarray(drawn[0]), np.asarray(drawn[1])

    matrix, offset = maps(shift=0.1)
    assert np.abs(offset[:, 0]).max() == pytest.approx(4, rel=0.01) and np.abs(offset[:, 1]).max() == pytest.approx(
        2, rel=0.01
    )
    np.testing.assert_allclose(matrix, np.broadcast_to(IDENTITY, matrix.shape), atol=1e-6)

    matrix, offset = maps(rotate=30)
    angles = np.degrees(np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    assert angles.min() == pytest.approx(-30, abs=0.2) and angles.max() == pytest.approx(30, abs=0.2)
    np.testing.assert_allclose(np.linalg.det(matrix), 1, rtol=1e-5)
    np.testing.assert_array_equal(offset, 0)

    matrix, _ = maps(scale=0.25)
    assert matrix[:, 0, 0].min() == pytest.approx(0.8, rel=0.01) and matrix[:, 0, 0].max() == pytest.approx(
        1.25, rel=0.01
    )
    np.testing.assert_array_equal(matrix[:, 0, 0], matrix[:, 1, 1])

    matrix, _ = maps(shear=45)
    assert np.abs(matrix[:, 0, 1]).max() == pytest.approx(1, rel=0.01)
    np.testing.assert_array_equal(matrix[:, 1, 0], 0)
    assert (matrix[:, 1, 1] == 1).all()


def test_a_composed_warp_undoes_shift_rotation_shear_and_scale_in_that_order() -> None:
    matrix, offset = augment.draw(jax.random.key(3), (50, 20, 20), EVERYTHING) or (np.zeros(0), np.zeros(0))
    plain = config.Data(rotate=20, scale=0.2, shear=10)
    inner, still = augment.draw(jax.random.key(3), (50, 20, 20), plain) or (np.zeros(0), np.zeros(0))
    np.testing.assert_array_equal(still, 0)
    left = np.asarray(matrix) @ np.linalg.inv(inner)  # the outermost factor: the flip and the box, along the axes
    np.testing.assert_allclose(left[:, 0, 1], 0, atol=1e-5)
    np.testing.assert_allclose(left[:, 1, 0], 0, atol=1e-5)
    assert (left[:, 1, 1] > 0).all() and 10 < (left[:, 0, 0] < 0).sum() < 40
    assert np.abs(left).max() <= 1 + 1e-5
    scales = np.sqrt(np.linalg.det(inner))
    assert (scales > 1 / 1.2 - 1e-5).all() and (scales < 1.2 + 1e-5).all()


def blends(mixup: float, cutmix: float, count: int = 60) -> list[tuple[np.ndarray, float]]:
    """(weights [H, W], share) of many keys, read off images of ones against zeros and targets of two classes."""
    images: Any = np.zeros((2, 12, 10, 1), np.float32)
    images[0] = 1
    mix = jax.jit(lambda key: augment.mix(images, jnp.eye(2), key, mixup=mixup, cutmix=cutmix))
    results = []
    for seed in range(count):
        mixed, targets = mix(jax.random.key(seed))
        np.testing.assert_allclose(targets.sum(-1), 1, rtol=1e-6)
        np.testing.assert_allclose(mixed[0] + mixed[1], 1, rtol=1e-6)
        results.append((np.asarray(mixed)[0, :, :, 0], float(targets[0, 0])))
    return results


def test_mixup_blends_every_pixel_and_the_target_by_one_lambda() -> None:
    results = blends(0.5, 0.0)
    for weights, share in results:
        np.testing.assert_allclose(weights, share, rtol=1e-6)
    shares = np.array([share for _, share in results])
    assert 0.3 < shares.mean() < 0.7 and shares.std() > 0.2  # Beta(0.5, 0.5): mean 0.5, deviation 0.35


@pytest.mark.parametrize("alpha", [0.02, 0.2, 0.8, 1.0, 5.0])
def test_lambda_has_the_distribution_beta(alpha: float) -> None:
    keys = jax.random.split(jax.random.key(1), 20_000)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: augment.symmetric_beta(key, alpha)))(keys), np.float64)
    assert drawn.min() >= 0 and drawn.max() <= 1
    # Kolmogorov and Smirnov's test at 1 %, away from the ends, where float32 rounds many numbers to 0 or 1.
    grid = np.linspace(1e-3, 1 - 1e-3, 500)
    shares = (drawn[:, None] <= grid).mean(axis=0)
    assert np.abs(shares - stats.beta(alpha, alpha).cdf(grid)).max() < 1.63 / np.sqrt(len(drawn))


def test_cutmix_takes_a_box_and_the_target_has_exactly_its_area() -> None:
    for weights, share in blends(0.0, 1.0):
        assert set(np.unique(weights)) <= {0.0, 1.0}
        assert share == pytest.approx(weights.mean(), abs=1e-6)
        rows, columns = np.nonzero(weights == 0)
        if rows.size:  # a rectangle, full
            assert rows.size == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)


def test_with_both_each_is_applied_in_about_half_of_the_steps() -> None:
    cut = [bool(np.isin(weights, (0.0, 1.0)).all()) for weights, _ in blends(0.8, 1.0)]
    assert 18 < sum(cut) < 42


@pytest.mark.parametrize(
    ("repeats", "partners"),
    [
        (1, [1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 10]),
        (2, [2, 3, 0, 1, 6, 7, 4, 5, 10, 9, 8]),
        (3, [4, 5, 6, 7, 0, 1, 2, 3, 10, 9, 8]),
        (9, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
    ],
)
def test_partners_are_a_power_of_two_of_rows_apart_and_the_rest_is_reversed(repeats: int, partners: list[int]) -> None:
    assert augment.partners(11, repeats).tolist() == partners
    images: Any = np.arange(11, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    mixed, targets = augment.mix(images, jnp.eye(11), jax.random.key(0), mixup=1.0, repeats=repeats)
    share = float(targets[0, 0])
    np.testing.assert_allclose(mixed[:, 0, 0, 0], share * np.arange(11) + (1 - share) * np.array(partners), rtol=1e-6)
    assert float(targets[0, partners[0]]) == pytest.approx(1 - share)


@pytest.mark.parametrize("repeats", range(1, 10))
def test_no_example_is_mixed_with_its_own_repetition(repeats: int) -> None:
    distance = augment.partners(64, repeats) - np.arange(64)
    assert (np.abs(distance) >= repeats).all()  # wherever in its repetitions an example begins
    examples = np.arange(64) // repeats
    assert (examples[augment.partners(64, repeats)] != examples).all()


@pytest.mark.parametrize(("repeats", "crosses"), [(1, False), (2, True)])
def test_images_cross_devices_as_bytes_and_only_where_a_device_holds_no_whole_group(
    repeats: int, crosses: bool
) -> None:
    mesh = meshes()[1]
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, layout.spec("batch") or PartitionSpec())
        images, targets = jax.device_put(IMAGES, rows), jax.device_put(TARGETS, rows)
        mix = jax.jit(lambda images, targets, key: augment.mix(images, targets, key, mixup=0.4, repeats=repeats))
        text = mix.lower(images, targets, jax.random.key(0)).compile().as_text()
    collectives = re.findall(r"= (\S+) (?:all-gather|all-reduce|all-to-all|collective-permute)\(", text)
    assert bool(collectives) is crosses
    assert not [one for one in collectives if "12,10,3" in one and not one.startswith("u8")]

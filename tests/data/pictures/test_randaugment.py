"""RandAugment: what each operation does at which level, and how they are drawn."""

import numpy as np
import pytest

from vit_dist.data.pictures import color, randaugment
from vit_dist.data.pictures.randaugment import OPERATIONS

SHAPES = [(24, 40, 3), (40, 24, 1), (1, 1, 3), (1, 1, 1), (1, 7, 3), (224, 224, 3)]


def picture(shape: tuple[int, ...]) -> np.ndarray:
    rows, columns, channels = np.ogrid[: shape[0], : shape[1], : shape[2]]
    return ((rows * 5 + columns * 3 + channels * 40 + rows * columns) % 256).astype(np.uint8)


def same_at(name: str, magnitude: float, *expected: np.ndarray) -> None:
    """Asserts that the operation gives these images, one for each direction, and no others."""
    image = picture((40, 24, 3))
    results = {OPERATIONS[name](image, magnitude / 10, np.random.default_rng(i)).tobytes() for i in range(20)}
    assert results == {it.tobytes() for it in expected}


@pytest.mark.parametrize("magnitude", [0.0, 5.0, 9.0, 10.0, 15.0, 20.0])
def test_levels_are_those_of_the_official_code(magnitude: float) -> None:
    image, level = picture((40, 24, 3)), magnitude / 10
    factor = 0.1 + 0.18 * magnitude
    same_at("AutoContrast", magnitude, color.auto_contrast(image))
    same_at("Equalize", magnitude, color.equalize(image))
    same_at("Invert", magnitude, 255 - image)
    same_at("Rotate", magnitude, randaugment.rotate(image, 30 * level), randaugment.rotate(image, -30 * level))
    same_at("Posterize", magnitude, color.posterize(image, {0: 1, 5: 2, 9: 3, 10: 4, 15: 6, 20: 8}[int(magnitude)]))
    same_at("Solarize", magnitude, color.solarize(image, {0: 0, 5: 128, 9: 230}.get(int(magnitude), 256)))
    same_at("SolarizeAdd", magnitude, color.solarize_add(image, round(11 * magnitude)))
    for name, change in (
        ("Color", color.saturation),
        ("Contrast", color.contrast),
        ("Brightness", color.brightness),
        ("Sharpness", color.sharpness),
    ):
        same_at(name, magnitude, change(image, factor))
    for name, move, most in (
        ("ShearX", randaugment.shear_x, 0.3),
        ("ShearY", randaugment.shear_y, 0.3),
        ("TranslateX", randaugment.translate_x, 100 / 224),
        ("TranslateY", randaugment.translate_y, 100 / 224),
    ):
        same_at(name, magnitude, move(image, most * level), move(image, -most * level))


def test_five_leaves_enhancements_alone_and_ten_solarises_nothing() -> None:
    image = picture((40, 24, 3))
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        same_at(name, 5.0, image)
    for magnitude in (10.0, 15.0, 20.0):
        same_at("Solarize", magnitude, image)


def test_geometry_by_hand() -> None:
    image = np.arange(1, 13, dtype=np.uint8).reshape(3, 4, 1)
    rows = image[:, :, 0].tolist()
    assert randaugment.translate_x(image, 0.25)[:, :, 0].tolist() == [row[1:] + [128] for row in rows]
    assert randaugment.translate_x(image, -0.5)[:, :, 0].tolist() == [[128, 128] + row[:2] for row in rows]
    assert randaugment.translate_y(image, 1 / 3)[:, :, 0].tolist() == [*rows[1:], [128] * 4]
    assert randaugment.shear_x(image, 1.0)[:, :, 0].tolist() == [
        [1, 2, 3, 4],
        [6, 7, 8, 128],
        [11, 12, 128, 128],
    ]
    assert randaugment.shear_y(image, 1.0)[:, :, 0].tolist() == [
        [1, 6, 11, 128],
        [5, 10, 128, 128],
        [9, 128, 128, 128],
    ]
    square = np.arange(9, dtype=np.uint8).reshape(3, 3, 1)
    assert randaugment.rotate(square, 90)[:, :, 0].tolist() == np.rot90(square[:, :, 0], -1).tolist()
    assert randaugment.rotate(square, 180)[:, :, 0].tolist() == square[::-1, ::-1, 0].tolist()
    corner = randaugment.rotate(np.zeros((101, 101, 3), np.uint8), 45)
    assert (corner[0, 0] == 128).all() and (corner[50, 50] == 0).all()


def test_geometry_is_bilinear() -> None:
    image = np.array([[[0, 100], [100, 200], [200, 0]]], np.uint8)
    moved = randaugment.translate_x(image, 0.5 / 3)
    assert moved.tolist() == [[[50, 150], [150, 100], [164, 64]]]  # halfway to the gray outside at the end


def test_cutout_is_a_square_anywhere_and_cut_off_at_the_edge() -> None:
    image, covered = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30))
    rng = np.random.default_rng(0)
    for _ in range(3000):
        gray = randaugment.cutout(image, 3, rng)
        assert set(np.unique(gray)) == {0, 128} and (gray == gray[:, :, :1]).all()
        rows, columns = np.nonzero(gray[:, :, 0])
        assert len(rows) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1) <= 36
        covered += gray[:, :, 0] > 0
    inner = covered[3:-3, 3:-3] / 3000
    assert inner.mean() == pytest.approx(36 / 600, rel=0.03) and inner.min() > 0.04 and inner.max() < 0.08
    assert covered[0, 0] / 3000 == pytest.approx(16 / 600, abs=0.012)  # centres 0 to 3 each way reach the corner
    assert not image.any()


def test_cutout_is_as_large_a_share_of_any_image() -> None:
    for side, half in ((224, 40), (112, 20), (28, 5)):
        boxes = [
            int((OPERATIONS["Cutout"](np.zeros((side, 2 * side, 1), np.uint8), 1.0, rng) > 0).sum())
            for rng in map(np.random.default_rng, range(20))
        ]
        assert max(boxes) == (2 * half) ** 2


def test_operations_are_drawn_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda image, level, rng, name=name: drawn.append(name) or image)
    rng, image = np.random.default_rng(0), np.zeros((1, 1, 3), np.uint8)
    for _ in range(2000):
        assert randaugment.randaugment(image, 2, 10.0, 0.0, rng) is image
    names, counts = np.unique(drawn, return_counts=True)
    assert len(drawn) == 4000 and len(names) == 16
    assert ((counts - 250) ** 2 / 250).sum() < 37.7  # chi-square of 15 degrees, 0.1 %
    pairs = np.array([names.searchsorted(name) for name in drawn]).reshape(-1, 2)
    table = np.histogram2d(*pairs.T, bins=16)[0]
    assert ((table - 2000 / 256) ** 2 / (2000 / 256)).sum() < 330.5  # of 255 degrees: the second heeds not the first


def test_magnitudes_are_drawn_about_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    levels: list[float] = []
    for name in OPERATIONS:
        monkeypatch.setitem(OPERATIONS, name, lambda image, level, rng: levels.append(level) or image)
    rng, image = np.random.default_rng(0), np.zeros((1, 1, 3), np.uint8)
    randaugment.randaugment(image, 2000, 9.0, 0.5, rng)
    assert np.mean(levels) == pytest.approx(0.9, abs=0.005) and np.std(levels) == pytest.approx(0.05, rel=0.05)
    levels.clear()
    randaugment.randaugment(image, 2000, 1.0, 5.0, rng)
    assert min(levels) == 0.0 and np.mean(np.array(levels) == 0.0) == pytest.approx(0.42, abs=0.04)
    levels.clear()
    randaugment.randaugment(image, 3, 15.0, 0.0, rng)
    assert levels == [1.5, 1.5, 1.5]


def test_directions_are_drawn_evenly() -> None:
    rng, image = np.random.default_rng(0), picture((8, 8, 1))
    left = randaugment.translate_x(image, 100 / 224).tobytes()
    times = sum(OPERATIONS["TranslateX"](image, 1.0, rng).tobytes() == left for _ in range(2000))
    assert 900 < times < 1100


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_pure_and_takes_any_image_at_any_magnitude(name: str) -> None:
    for shape in SHAPES:
        image = picture(shape)
        frozen = image.copy()
        frozen.setflags(write=False)
        mirrored = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
        for magnitude in (0.0, 9.5, 15.0, 20.0, 30.0):
            first, *others = (
                OPERATIONS[name](it, magnitude / 10, np.random.default_rng(3))
                for it in (image, image, frozen, mirrored)
            )
            assert first.shape == shape and first.dtype == np.uint8
            assert all(np.array_equal(first, other) for other in others)
            np.testing.assert_array_equal(image, frozen)

"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719): a few random operations in a row, all of one magnitude.

This is what `randaug(2, 15)` means in the AugReg recipes (vision_transformer, big_vision), after the official
TensorFlow code: sixteen equally likely operations, always applied, in a random direction where they have one, and with
gray for pixels from outside the image.

A magnitude of 10 is the upper end of the ranges that the paper searched. Recipes go up to 15 and 20, and the linear
formulas below hold there too; a value is cut off at the end of an operation's domain:

| operation | at level = magnitude / 10 | at 15 |
|---|---|---|
| Rotate | ± 30 degrees x level | 45 degrees |
| ShearX, ShearY | ± 0.3 x level, about the top left corner | 0.45 |
| TranslateX, TranslateY | ± 100/224 x level of the side | 67 % |
| Cutout | half a box's side: 40/224 x level of the short side | a box of 54 % of it |
| Color, Contrast, Brightness, Sharpness | factor 0.1 + 1.8 x level, so 5 changes nothing | 2.8 |
| Posterize | keeps 4 x level bits, 1 to 8: a higher magnitude changes less | 6 |
| Solarize | inverts values from 256 x level up, none from 10 on: a higher magnitude changes less | the image |
| SolarizeAdd | 110 x level added to values below 128, to 255 at most | 165 |
| AutoContrast, Equalize, Invert | the same at every level | |

Differences from the official code: translations and cutouts are shares of the side, with the same result at 224
pixels, so that small images remain recognisable; geometry is bilinear, not nearest; contrast blends with the mean luma,
as in the paper and in Pillow, where the official code uses the number of pixels / 256. timm's `rand-m9-mstd0.5-inc1`
differs more: it has no Cutout, skips each operation with probability 1/2, and makes every operation stronger with the
magnitude, which ends at 10.
"""

import math
from collections.abc import Callable

import numpy as np

from vit_dist.data.libraries import cv2
from vit_dist.data.pictures import color

_FILL = 128  # gray, for pixels from outside the image
_TRANSLATE = 100 / 224  # share of the side, at level 1
_CUTOUT = 40 / 224  # share of the short side, at level 1

Operation = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def randaugment(image: np.ndarray, layers: int, magnitude: float, std: float, rng: np.random.Generator) -> np.ndarray:
    """Applies random operations to an image.

    Args:
      image: `uint8 [H, W, C]`.
      layers: how many operations are drawn from `OPERATIONS`.
      magnitude: of all operations; the mean magnitude if `std` is not 0.
      std: standard deviation of the Gaussian from which each operation's magnitude is drawn, cut off at 0.
      rng: draws the numbers.

    Returns:
      `uint8 [H, W, C]`.
    """
    operations = list(OPERATIONS.values())
    for _ in range(layers):
        operation = operations[rng.integers(len(operations))]
        own_magnitude = max(0.0, rng.normal(magnitude, std)) if std else magnitude
        image = operation(image, own_magnitude / 10, rng)
    return image


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates the image clockwise about its centre."""
    height, width = image.shape[:2]
    sine, cosine = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    x, y = (width - 1) / 2, (height - 1) / 2
    return _affine(image, (cosine, sine, x - cosine * x - sine * y), (-sine, cosine, y + sine * x - cosine * y))


def shear_x(image: np.ndarray, amount: float) -> np.ndarray:
    """Moves each row left by `amount` times its index."""
    return _affine(image, (1, amount, 0), (0, 1, 0))


def shear_y(image: np.ndarray, amount: float) -> np.ndarray:
    """Moves each column up by `amount` times its index."""
    return _affine(image, (1, 0, 0), (amount, 1, 0))


def translate_x(image: np.ndarray, share: float) -> np.ndarray:
    """Moves the image left by `share` of its width."""
    return _affine(image, (1, 0, share * image.shape[1]), (0, 1, 0))


def translate_y(image: np.ndarray, share: float) -> np.ndarray:
    """Moves the image up by `share` of its height."""
    return _affine(image, (1, 0, 0), (0, 1, share * image.shape[0]))


def cutout(image: np.ndarray, half: int, rng: np.random.Generator) -> np.ndarray:
    """Fills a square of side `2 * half` about a random pixel with gray, as far as it lies within the image.

    (DeVries and Taylor 2017, arXiv:1708.04552.)
    """
    row, column = rng.integers(image.shape[0]), rng.integers(image.shape[1])
    image = image.copy()
    image[max(0, row - half) : row + half, max(0, column - half) : column + half] = _FILL
    return image


def _affine(image: np.ndarray, x: tuple[float, float, float], y: tuple[float, float, float]) -> np.ndarray:
    """Samples the image linearly: pixel (column, row) is the input at (`x` . p, `y` . p), p = (column, row, 1)."""
    size, flags = (image.shape[1], image.shape[0]), cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(image, np.array([x, y], np.float64), size, flags=flags, borderValue=(_FILL,) * 4)
    return moved.reshape(image.shape)


def _signed(value: float, rng: np.random.Generator) -> float:
    """Negates the value with probability 1/2."""
    return -value if rng.random() < 0.5 else value


def _factor(level: float) -> float:
    return 0.1 + 1.8 * level


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": lambda image, level, rng: color.auto_contrast(image),
    "Equalize": lambda image, level, rng: color.equalize(image),
    "Invert": lambda image, level, rng: color.invert(image),
    "Rotate": lambda image, level, rng: rotate(image, _signed(30 * level, rng)),
    "Posterize": lambda image, level, rng: color.posterize(image, min(max(int(4 * level), 1), 8)),
    "Solarize": lambda image, level, rng: color.solarize(image, min(int(256 * level), 256)),
    "Color": lambda image, level, rng: color.saturation(image, _factor(level)),
    "Contrast": lambda image, level, rng: color.contrast(image, _factor(level)),
    "Brightness": lambda image, level, rng: color.brightness(image, _factor(level)),
    "Sharpness": lambda image, level, rng: color.sharpness(image, _factor(level)),
    "ShearX": lambda image, level, rng: shear_x(image, _signed(0.3 * level, rng)),
    "ShearY": lambda image, level, rng: shear_y(image, _signed(0.3 * level, rng)),
    "TranslateX": lambda image, level, rng: translate_x(image, _signed(_TRANSLATE * level, rng)),
    "TranslateY": lambda image, level, rng: translate_y(image, _signed(_TRANSLATE * level, rng)),
    "Cutout": lambda image, level, rng: cutout(image, int(_CUTOUT * level * min(image.shape[:2])), rng),
    "SolarizeAdd": lambda image, level, rng: color.solarize_add(image, int(110 * level)),
}

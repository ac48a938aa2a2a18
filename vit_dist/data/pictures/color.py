"""Colour operations on one image, `uint8 [H, W, C]` -> `uint8 [H, W, C]`: they change values and move no pixels.

The names mean what they mean in Pillow's ImageEnhance and ImageOps, and results agree with Pillow's to a level or two
(this module rounds blends, Pillow truncates them); OpenCV does the work in a fraction of the time. An operation that
cannot change an image, such as the saturation of a gray one, returns it unchanged; the input is never written to.
"""

from collections.abc import Callable

import numpy as np

from vit_dist.data.libraries import cv2

_LUMA = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601, as Pillow's mode L
_VALUES = np.arange(256, dtype=np.uint8)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH


def color_jitter(image: np.ndarray, amount: float, hue: float, rng: np.random.Generator) -> np.ndarray:
    """Changes brightness, contrast, saturation and hue, in a random order (torchvision's `ColorJitter`).

    Args:
      image: `uint8 [H, W, C]`.
      amount: the factor of each of the first three is uniform in `[max(0, 1 - amount), 1 + amount]`.
      hue: the turn is uniform in `[-hue, hue]`, as a share of the colour circle.
      rng: draws the numbers.

    Returns:
      `uint8 [H, W, C]`.
    """
    operations: list[tuple[Callable[[np.ndarray, float], np.ndarray], float]] = []
    if amount:
        factors = rng.uniform(max(0.0, 1 - amount), 1 + amount, 3)
        operations += zip((brightness, contrast, saturation), factors.tolist())
    if hue:
        operations.append((turn_hue, rng.uniform(-hue, hue)))
    for i in rng.permutation(len(operations)):
        operation, strength = operations[i]
        image = operation(image, strength)
    return image


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Returns `factor * image`: 0 gives black, 1 the image."""
    return _blend(image, image, factor, 0.0)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends the image with its mean luma: a factor of 0 gives the mean everywhere, 1 the image, more exaggerates."""
    if image.shape[2] == 3:
        mean = float(np.dot(cv2.mean(image)[:3], _LUMA))
    else:
        mean = cv2.mean(image.reshape(image.shape[0], -1))[0]
    return _blend(image, image, factor, 0.0, (1 - factor) * mean)


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends RGB with its gray image: a factor of 0 gives gray, 1 the image, more exaggerates."""
    return image if image.shape[2] != 3 else _blend(image, gray(image), factor, 1 - factor)


def turn_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """Turns the hue of RGB by `turn` of the colour circle, rounded to 1/256 (HSV of 8 bits)."""
    steps = round(256 * turn) % 256
    if not steps or image.shape[2] != 3:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[:, :, 0] += np.uint8(steps)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def gray(image: np.ndarray) -> np.ndarray:
    """Returns the luma of RGB, repeated in all three channels."""
    return image if image.shape[2] != 3 else cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends the image with a smoothed copy: a factor of 0 gives the copy, 1 the image, more sharpens.

    The outermost pixels do not change.
    """
    if min(image.shape[:2]) < 3:
        return image
    kernel = (1 - factor) * _SMOOTH
    kernel[1, 1] += factor
    result = cv2.filter2D(image, -1, kernel).reshape(image.shape)
    result[[0, -1]], result[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
    return result


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Blurs by a Gaussian of standard deviation `sigma` in pixels, with the outermost pixels repeated past the edge."""
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE).reshape(image.shape)


def invert(image: np.ndarray) -> np.ndarray:
    """Returns 255 minus each value."""
    return ~image


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the `bits` highest bits (0 to 8) of each value and sets the others to zero."""
    return image & np.uint8(256 - (1 << (8 - bits)))


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts the values of `threshold` (0 to 256) and above."""
    return _look_up(image, np.where(_VALUES < threshold, _VALUES, ~_VALUES))


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
    """Adds `addition` (0 or more) to values below 128, up to 255."""
    raised = np.minimum(_VALUES.astype(np.int64) + addition, 255)
    return _look_up(image, np.where(_VALUES < 128, raised, _VALUES).astype(np.uint8))


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel so that its darkest value is 0 and its brightest 255, unless the channel is constant."""
    low = image.min(axis=0).min(axis=0).astype(np.float64)  # one axis at a time: a hundredth of the time of axis=(0, 1)
    high = image.max(axis=0).max(axis=0).astype(np.float64)
    flat = high == low
    tables = (_VALUES[:, None] - low) * (255 / np.where(flat, 1, high - low))
    return _look_up(image, np.where(flat, _VALUES[:, None], tables.round().clip(0, 255)).astype(np.uint8))


def equalize(image: np.ndarray) -> np.ndarray:
    """Spreads the values of each channel so that all are about equally frequent, by exactly Pillow's integer rule."""
    tables = np.stack([_equalizing_table(image, channel) for channel in range(image.shape[2])], axis=1)
    return _look_up(image, tables)


def _equalizing_table(image: np.ndarray, channel: int) -> np.ndarray:
    """Returns the table `uint8 [256]` that gives about the same number of pixels to each step of the new values.

    The pixels of the brightest value do not count, since that value becomes 255 however many there are.
    """
    histogram = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
    step = int(histogram.sum() - histogram[np.flatnonzero(histogram)[-1]]) // 255
    if not step:
        return _VALUES
    darker = np.cumsum(histogram) - histogram
    return np.minimum((step // 2 + darker) // step, 255).astype(np.uint8)


def _blend(image: np.ndarray, other: np.ndarray, weight: float, other_weight: float, offset: float = 0.0) -> np.ndarray:
    """Returns `weight * image + other_weight * other + offset`, rounded and kept within 0 to 255."""
    return cv2.addWeighted(image, weight, other, other_weight, offset).reshape(image.shape)


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Returns `table[value]` for every value of the image; `table` is `uint8 [256]`, or `[256, C]`, one a channel."""
    return cv2.LUT(image, table if table.ndim == 1 else table[:, None]).reshape(image.shape)

"""Colour operations on one image, `uint8 [H, W, C]` -> `uint8 [H, W, C]`: what becomes of values, with pixels in place.

The names mean what they mean in Pillow's ImageEnhance and ImageOps, and results agree with Pillow's to a level or two
(blends are rounded here and cut off there); the work is OpenCV's, in a fraction of the time. An image that an operation
cannot change, such as a gray one whose saturation is asked for, comes back as it is; the input is never written to.
"""

from collections.abc import Callable

import numpy as np

from vit_dist.data.libraries import cv2

_LUMA = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601, as Pillow's mode L
_VALUES = np.arange(256, dtype=np.uint8)
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH


def color_jitter(image: np.ndarray, amount: float, hue: float, rng: np.random.Generator) -> np.ndarray:
    """The image with brightness, contrast, saturation and hue changed, in an order drawn anew (torchvision's meaning).

    The first three by factors drawn evenly from `[1 - amount, 1 + amount]` (from 0 where that is negative), the hue by
    a turn drawn evenly from `[-hue, hue]` of the colour circle.
    """
    steps: list[tuple[Callable[[np.ndarray, float], np.ndarray], float]] = []
    if amount:
        factors = rng.uniform(max(0.0, 1 - amount), 1 + amount, 3)
        steps += zip((brightness, contrast, saturation), factors.tolist())
    if hue:
        steps.append((turn_hue, rng.uniform(-hue, hue)))
    for i in rng.permutation(len(steps)):
        change, strength = steps[i]
        image = change(image, strength)
    return image


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """`factor * image`: 0 is black, 1 the image."""
    return _blend(image, image, factor, 0.0)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Between the image's mean luma everywhere, for 0, and the image, for 1; beyond for more."""
    if image.shape[2] == 3:
        mean = float(np.dot(cv2.mean(image)[:3], _LUMA))
    else:
        mean = cv2.mean(image.reshape(image.shape[0], -1))[0]
    return _blend(image, image, factor, 0.0, (1 - factor) * mean)


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Between the gray image, for 0, and the image, for 1; beyond for more. RGB alone has a saturation."""
    return image if image.shape[2] != 3 else _blend(image, gray(image), factor, 1 - factor)


def turn_hue(image: np.ndarray, turn: float) -> np.ndarray:
    """The hue moved along the colour circle by `turn`, 1 being all the way round, in steps of 1/256 (HSV of 8 bits)."""
    steps = round(256 * turn) % 256
    if not steps or image.shape[2] != 3:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[:, :, 0] += np.uint8(steps)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def gray(image: np.ndarray) -> np.ndarray:
    """The luma of RGB in all three channels."""
    return image if image.shape[2] != 3 else cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Between a slightly smoothed image, for 0, and the image, for 1; sharpened for more. The edge stays as it is."""
    if min(image.shape[:2]) < 3:
        return image
    kernel = (1 - factor) * _SMOOTH
    kernel[1, 1] += factor
    result = cv2.filter2D(image, -1, kernel).reshape(image.shape)
    result[[0, -1]], result[:, [0, -1]] = image[[0, -1]], image[:, [0, -1]]
    return result


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of standard deviation `sigma`, in pixels; the outermost pixels go on beyond the edge."""
    return cv2.GaussianBlur(image, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE).reshape(image.shape)


def invert(image: np.ndarray) -> np.ndarray:
    """255 less each value."""
    return ~image


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """The `bits` highest bits (0 to 8) of each value, the others zero."""
    return image & np.uint8(256 - (1 << (8 - bits)))


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Values of `threshold` (0 to 256) and above inverted."""
    return _look_up(image, np.where(_VALUES < threshold, _VALUES, ~_VALUES))


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
    """Values below 128 raised by `addition` (0 or more), to 255 at most."""
    raised = np.minimum(_VALUES.astype(np.int64) + addition, 255)
    return _look_up(image, np.where(_VALUES < 128, raised, _VALUES).astype(np.uint8))


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Each channel stretched so that its darkest value is 0 and its brightest 255; a channel of one value stays."""
    low = image.min(axis=0).min(axis=0).astype(np.float64)  # by rows, then columns: a hundredth of axis=(0, 1)'s time
    high = image.max(axis=0).max(axis=0).astype(np.float64)
    flat = high == low
    tables = (_VALUES[:, None] - low) * (255 / np.where(flat, 1, high - low))
    return _look_up(image, np.where(flat, _VALUES[:, None], tables.round().clip(0, 255)).astype(np.uint8))


def equalize(image: np.ndarray) -> np.ndarray:
    """Each channel with its values spread so that all are about as frequent (Pillow's integer rule, exactly)."""
    tables = np.stack([_equalizing(_histogram(image, channel)) for channel in range(image.shape[2])], axis=1)
    return _look_up(image, tables)


def _histogram(image: np.ndarray, channel: int) -> np.ndarray:
    return cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)


def _equalizing(histogram: np.ndarray) -> np.ndarray:
    """The table `uint8 [256]` of a channel with this `histogram`: as many pixels to each step of the new values.

    The brightest value's pixels are not shared out, since that one goes to 255 however many they are.
    """
    step = int(histogram.sum() - histogram[np.flatnonzero(histogram)[-1]]) // 255
    if not step:
        return _VALUES
    darker = np.cumsum(histogram) - histogram
    return np.minimum((step // 2 + darker) // step, 255).astype(np.uint8)


def _blend(image: np.ndarray, other: np.ndarray, weight: float, other_weight: float, offset: float = 0.0) -> np.ndarray:
    """The weighted sum and an offset, rounded and kept within 0 to 255."""
    return cv2.addWeighted(image, weight, other, other_weight, offset).reshape(image.shape)


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """`table[value]` for every value of the image; `table` is `uint8 [256]`, or `[256, C]`: one for each channel."""
    return cv2.LUT(image, table if table.ndim == 1 else table[:, None]).reshape(image.shape)

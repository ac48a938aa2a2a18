"""The weights of an antialiased resize, and torchvision's resize of `uint8` images by them, in numpy.

Each new pixel is a weighted sum of the old ones around it; when an image shrinks, the filter is widened by the factor
of the shrink. Pillow, torch and torchvision have the same weights. They differ in how they round: torchvision, which
transformers' processors call, resizes across first, rounds to grey levels of 0 to 255, then resizes down, with weights
in whole numbers of 16 bits. Where bicubic overshoots, the order and the rounding are worth several grey levels. (Pillow
went across first up to version 12; from 13 on it depends on the sizes.)
"""

from typing import NamedTuple

import numpy as np

from vit_dist.data.pictures.resize import Interpolation

_CUBIC = -0.5  # Keys' parameter
_REACH = {"bilinear": 1, "bicubic": 2}  # old pixels on either side of a new one, where nothing shrinks
_MAX_BITS, _WEIGHT_LIMIT = 22, 2**15  # of torchvision's weights
_ALL_ROWS = 65_536  # for more new pixels, only the weights of those that are wanted are computed
_BLOCK = 16  # new rows that are computed together


class Taps(NamedTuple):
    """The old pixels that some new ones are sums of: new pixel i has K of them, from `first[i]` on."""

    first: np.ndarray  # int [n]
    weights: np.ndarray  # float64 [n, K], 0 where a pixel has fewer


class Part(NamedTuple):
    """The new pixels of a side that are wanted."""

    resized: int  # number of pixels that the whole side is resized to
    start: int  # the first that is wanted
    wanted: int  # their number


def resize_matrix(old: int, new: int, interpolation: Interpolation) -> np.ndarray:
    """Returns the resize of a side from `old` to `new` pixels as a matrix, `float64 [new, old]`.

    It is that of torch's `interpolate(antialias=True, align_corners=False)`.
    """
    first, weights = _taps(old, new, interpolation, np.arange(new))
    return _dense(Taps(first, weights), 0, max(old, int(first.max()) + weights.shape[1]))[:, :old]


def resize_as_torchvision(image: np.ndarray, down: Part, across: Part, interpolation: Interpolation) -> np.ndarray:
    """Resizes an image as torchvision's `resize` does a tensor of `uint8`, but for the pixels that are not wanted.

    With bicubic the result is torchvision's. With bilinear, which does not overshoot, it is rounded only once, and so
    within one grey level of torchvision's result and half a level of that of float images, as DINOv3's processor has.

    Args:
      image: `uint8 [H, W, C]`.
      down: the rows that are wanted.
      across: the columns that are wanted.
      interpolation: the method.

    Returns:
      `uint8 [down.wanted, across.wanted, C]`.
    """
    row_taps, row_bits = _part(image.shape[0], down, interpolation)
    column_taps, column_bits = _part(image.shape[1], across, interpolation)
    start = int(row_taps.first.min())
    image = image[start : int(row_taps.first.max()) + row_taps.weights.shape[1]]
    row_taps = Taps(row_taps.first - start, row_taps.weights)
    if interpolation == "bilinear":
        wide = _apply(column_taps, image.transpose(1, 0, 2)).transpose(1, 0, 2)
        return _apply(row_taps, wide, bits=0)
    wide = _apply(_whole(column_taps, column_bits), image.transpose(1, 0, 2), column_bits).transpose(1, 0, 2)
    return _apply(_whole(row_taps, row_bits), wide, row_bits)


def _part(old: int, part: Part, interpolation: Interpolation) -> tuple[Taps, int]:
    """Returns the taps of the pixels that are wanted, and torchvision's bits after the point of all weights."""
    wanted = np.arange(part.start, part.start + part.wanted)
    if part.resized > _ALL_ROWS:
        taps = _taps(old, part.resized, interpolation, wanted)
        return taps, _bits(taps.weights.max())
    first, weights = _taps(old, part.resized, interpolation, np.arange(part.resized))
    return Taps(first[wanted], weights[wanted]), _bits(weights.max())


def _taps(old: int, new: int, interpolation: Interpolation, pixels: np.ndarray) -> Taps:
    """Returns the taps of the new `pixels` of a side that is resized from `old` to `new`."""
    scale = old / new
    widening = max(scale, 1.0)
    centres = (pixels + 0.5) * scale
    reach = _REACH[interpolation] * widening
    first = np.maximum(centres - reach + 0.5, 0).astype(int)
    last = np.minimum(centres + reach + 0.5, old).astype(int)
    columns = first[:, None] + np.arange(int((last - first).max()))
    weights = _FILTERS[interpolation](np.abs(columns + 0.5 - centres[:, None]) / widening)
    weights[columns >= last[:, None]] = 0
    return Taps(first, weights / weights.sum(axis=1, keepdims=True))


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - x, 0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Returns Keys' cubic convolution kernel at `x` >= 0 (1981, doi:10.1109/TASSP.1981.1163711)."""
    near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x**2 + 1
    far = _CUBIC * (((x - 5) * x + 8) * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_FILTERS = {"bilinear": _triangle, "bicubic": _cubic}


def _bits(largest: float) -> int:
    """Returns the most bits after the point with which the largest weight still fits torchvision's 16 bits."""
    return next((bits for bits in range(_MAX_BITS) if int(0.5 + largest * 2 ** (bits + 1)) >= _WEIGHT_LIMIT), _MAX_BITS)


def _whole(taps: Taps, bits: int) -> Taps:
    """Returns the weights times 2**bits, rounded, halves away from zero."""
    scaled = taps.weights * 2**bits
    return Taps(taps.first, np.copysign(np.floor(np.abs(scaled) + 0.5), scaled))


def _dense(taps: Taps, start: int, stop: int) -> np.ndarray:
    """Returns taps as a matrix, `float64 [n, stop - start]`, for the old pixels from `start` to `stop`."""
    matrix = np.zeros((len(taps.first), stop - start))
    columns = taps.first[:, None] - start + np.arange(taps.weights.shape[1])
    np.put_along_axis(matrix, columns, taps.weights, axis=1)
    return matrix


def _apply(taps: Taps, image: np.ndarray, bits: int | None = None) -> np.ndarray:
    """Resizes `[H, W, C]` down to `[n, W, C]`.

    With `bits`, sums are divided by 2**bits and rounded, halves up, to `uint8`; without, they are left as they are.
    """
    blocks = []
    for begin in range(0, len(taps.first), _BLOCK):  # a few rows at a time, which depend on few old ones
        some = Taps(taps.first[begin : begin + _BLOCK], taps.weights[begin : begin + _BLOCK])
        start, stop = int(some.first.min()), int(some.first.max()) + some.weights.shape[1]
        old = np.ascontiguousarray(image[start:stop], np.float64)
        sums = _dense(some, start, stop)[:, : len(old)] @ old.reshape(len(old), -1)  # taps past the edge weigh nothing
        blocks.append(sums if bits is None else np.clip(np.floor(sums / 2**bits + 0.5), 0, 255).astype(np.uint8))
    return np.concatenate(blocks).reshape(len(taps.first), *image.shape[1:])

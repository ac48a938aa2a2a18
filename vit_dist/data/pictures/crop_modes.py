"""Brings an image to the model's size as other libraries evaluate, where `data.eval_crop_mode` is not `fast`.

They resize the whole image, to a size in whole pixels, and then cut its centre. The rounding of the size and of the cut
moves every pixel, and that of the resize changes some by several grey levels, so it is theirs here (`Rounding`): `timm`
is timm's and OpenCLIP's, with Pillow's resize; `transformers` is that of its processors, with torchvision's resize.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

from vit_dist.data.pictures.resample import Part, resize_as_torchvision
from vit_dist.data.pictures.resize import Interpolation, resize_by_pillow

CropMode = Literal["center", "squash", "border"]
Rounding = Literal["timm", "transformers"]

_MOST = 2**24  # pixels: a thin image that would have more is not resized whole


class Side(NamedTuple):
    """What becomes of the height or the width of an image, in pixels."""

    resized: int  # of the whole image
    cut: int  # of the resized image, before those that are kept
    kept: int
    before: int  # to fill, before those that are kept
    after: int  # to fill, after them


def place(
    image: tuple[int, int], size: tuple[int, int], mode: CropMode, ratio: float, rounding: Rounding
) -> tuple[Side, Side]:
    """Returns how an image is resized, cut and filled.

    Args:
      image: its height and width in pixels.
      size: height and width of the result.
      mode: `squash`: both sides are resized to those of `size` / `ratio`. The others keep the aspect: the image becomes
        as small as it may be to cover `size` / `ratio` (`center`), or as large as it may be to lie within (`border`).
      ratio: in (0, 1], timm's `crop_pct`; `size` / `ratio` is rounded down.
      rounding: whose; an odd number of pixels to cut is split in another way.

    Returns:
      Height and width.
    """
    scaled = (math.floor(size[0] / ratio), math.floor(size[1] / ratio))
    if mode == "squash":
        resized = scaled
    elif mode == "border" or scaled[0] != scaled[1]:  # timm's ResizeKeepRatio
        shrinks = (image[0] / scaled[0], image[1] / scaled[1])
        shrink = max(shrinks) if mode == "border" else min(shrinks)
        resized = (max(1, round(image[0] / shrink)), max(1, round(image[1] / shrink)))
    else:  # torchvision's Resize
        short = min(image)
        resized = (int(scaled[0] * image[0] / short), int(scaled[1] * image[1] / short))
    height, width = (_centre(old, new, rounding) for old, new in zip(resized, size, strict=True))
    return height, width


def fit(
    image: np.ndarray,
    size: tuple[int, int],
    mode: CropMode,
    ratio: float,
    rounding: Rounding,
    interpolation: Interpolation,
    fill: np.ndarray,
) -> np.ndarray:
    """Resizes an image, and cuts or fills it.

    Args:
      image: `uint8 [H, W, C]`.
      size: (height, width) of the result.
      mode: as in `place`.
      ratio: as in `place`.
      rounding: whose.
      interpolation: the method.
      fill: `uint8 [C]`, what stands where the resized image does not reach (`border`).

    Returns:
      `uint8 [*size, C]`, which shares no memory with the image.
    """
    height, width = place((image.shape[0], image.shape[1]), size, mode, ratio, rounding)
    resized = (height.resized, width.resized)
    if rounding == "timm" and math.prod(resized) <= max(_MOST, 4 * math.prod(size)):
        whole = resize_by_pillow(image, resized, (0, 0, *image.shape[:2]), interpolation)
        kept = whole[height.cut : height.cut + height.kept, width.cut : width.cut + width.kept]
    else:
        kept = resize_as_torchvision(image, Part(*height[:3]), Part(*width[:3]), interpolation)
    canvas = np.empty((*size, image.shape[2]), np.uint8)
    canvas[:] = fill
    canvas[height.before : size[0] - height.after, width.before : size[1] - width.after] = kept
    return canvas


def fill_levels(mean: float | tuple[float, ...], channels: int) -> np.ndarray:
    """Returns `data.mean` in grey levels, `uint8 [channels]`, with which timm fills borders."""
    means = mean if isinstance(mean, tuple) else (mean,) * channels
    return np.array([min(max(round(255 * one), 0), 255) for one in means], np.uint8)


def _centre(old: int, new: int, rounding: Rounding) -> Side:
    """Returns what becomes of a side of `old` pixels of which `new` are wanted."""
    if old < new:
        return Side(old, 0, old, (new - old) // 2, (new - old + 1) // 2)
    half = (old - new) / 2
    return Side(old, math.floor(half) if rounding == "transformers" else round(half), new, 0, 0)

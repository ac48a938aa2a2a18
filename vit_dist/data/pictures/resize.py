"""Resizes a box of an image to the size that the model takes, antialiased. All images are `uint8 [H, W, C]`.

Bilinear is OpenCV's, which does not antialias by itself. So an image that shrinks is first smoothed by the weights
`[v, 1 - 2v, v]`, where v grows from 0 to 1/4 as the shrink factor (old side / new side) grows from 1 to 2; above 2,
each new pixel is the mean of several points, at most two old pixels apart. At a factor of 2 the weights are those of
Pillow's bilinear; at every factor they pass no more noise than the mean over the exact area, which takes two to three
times as long. On photographs the result differs from Pillow's bilinear by 0.5 to 0.9 grey levels in the mean for
factors of 1 to 3 (an image by up to 2.3, a single pixel by up to 44), by 1.5 for factors of 3 to 6 (up to 3.0 and 37),
and by at most one level if the image grows.

Bicubic is Pillow's, with which published evaluations were run; it takes four to ten times as long as bilinear.
"""

import math
from typing import Literal

import numpy as np
from PIL import Image

from vit_dist.data.libraries import cv2
from vit_dist.data.pictures.crop import Box

Interpolation = Literal["bilinear", "bicubic"]
FractionalBox = tuple[float, float, float, float]  # a `Box` whose edges can cut through pixels

_PILLOWS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_WARP_SIDE = 32_766  # pixels: the longest side that OpenCV 4 takes in warpAffine


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
    box: Box | FractionalBox | None = None,
) -> np.ndarray:
    """Resizes an image, or a box of it.

    Args:
      image: `uint8 [H, W, C]`.
      size: (height, width) of the result.
      interpolation: the method; see the module's docstring.
      box: (top, left, height, width) in pixels; None: the image.

    Returns:
      `uint8 [*size, C]`, which shares the image's memory if the box has that size already.
    """
    top, left, height, width = (0, 0, *image.shape[:2]) if box is None else box
    first_row, first_column = math.floor(top), math.floor(left)
    image = image[first_row : math.ceil(top + height), first_column : math.ceil(left + width)]
    inner_box = (top - first_row, left - first_column, height, width)
    method = resize_by_pillow if interpolation == "bicubic" else _bilinear
    return method(image, size, inner_box).reshape(*size, image.shape[2])


def resize_by_pillow(
    image: np.ndarray, size: tuple[int, int], box: FractionalBox, interpolation: Interpolation = "bicubic"
) -> np.ndarray:
    """Resizes a box of an image by Pillow. Pixels around the box count, as they do when the whole image is resized.

    Args:
      image: `uint8 [H, W, C]`.
      size: (height, width) of the result.
      box: (top, left, height, width) in pixels.
      interpolation: Pillow's method.

    Returns:
      `uint8 [*size, C]`, which is the image itself if the box covers it and has that size already.
    """
    top, left, height, width = box
    if image.shape[:2] == (height, width) == size:
        return image
    # `min`, since a rounded sum of floats can be past the image's edge
    edges = (left, top, min(left + width, image.shape[1]), min(top + height, image.shape[0]))
    planes = [image] if image.shape[2] == 3 else [image[..., channel] for channel in range(image.shape[2])]
    method = _PILLOWS[interpolation]
    resized = [np.asarray(Image.fromarray(plane).resize(size[::-1], method, edges)) for plane in planes]
    return resized[0] if image.shape[2] == 3 else np.stack(resized, axis=-1)


def _bilinear(image: np.ndarray, size: tuple[int, int], box: FractionalBox) -> np.ndarray:
    top, left, height, width = box
    shrinks = [old / new for old, new in zip((height, width), size, strict=True)]
    points = [max(1, math.ceil(shrink / 2)) for shrink in shrinks]  # sampled in each new pixel, down and across
    weights = [min(max(shrink - 1, 0), 1) / 4 for shrink in shrinks]
    if any(weights):
        down, across = (np.array([weight, 1 - 2 * weight, weight], np.float32) for weight in weights)
        image = cv2.sepFilter2D(image, -1, across, down, borderType=cv2.BORDER_REPLICATE)
    one_point = max(points) == 1
    # If one side shrinks by more than 2, a side that grows does so last: a thin image would need too much memory.
    rows, columns = (
        new * count if one_point or shrink > 1 else old
        for new, count, shrink, old in zip(size, points, shrinks, image.shape[:2], strict=True)
    )
    if image.shape[:2] != (height, width) and max(image.shape[:2]) <= _WARP_SIDE:
        step_down, step_across = height / rows, width / columns  # between the middles of the points
        matrix = np.array([[step_across, 0, left + step_across / 2 - 0.5], [0, step_down, top + step_down / 2 - 0.5]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        image = cv2.warpAffine(image, matrix, (columns, rows), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    elif image.shape[:2] != (rows, columns):
        image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR)
    if not one_point:
        image = cv2.resize(image, (columns // points[1], rows // points[0]), interpolation=cv2.INTER_AREA)
    return image if image.shape[:2] == size else cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)

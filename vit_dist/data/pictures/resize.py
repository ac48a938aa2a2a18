"""A box of an image -> the size that the model wants, antialiased. Everything is uint8 `[H, W, C]`.

Bilinear is OpenCV's, which by itself does not antialias. So an image that shrinks is first softened by the weights
`[v, 1 - 2v, v]`, where v grows from 0 to 1/4 as the shrink does from 1 to 2; and above 2, each new pixel is the mean of
several points, no more than two old pixels apart. At a shrink of 2 the weights are those of Pillow's bilinear, and at
any they pass no more noise than the mean over the exact area, which takes two to three times as long. On photographs
it differs from Pillow's bilinear by 0.5 to 0.9 grey levels in the mean for shrinks of 1 to 3 (an image by up to 2.3, a
single pixel by up to 44), by 1.5 for shrinks of 3 to 6 (up to 3.0 and 37), and where it enlarges by a level at most.

Bicubic is Pillow's, which is what published evaluations were run with, and takes four to ten times as long as bilinear.
"""

import math
from typing import Literal

import numpy as np
from PIL import Image

from vit_dist.data.libraries import cv2
from vit_dist.data.pictures.crop import Box

Interpolation = Literal["bilinear", "bicubic"]
PartBox = tuple[float, float, float, float]  # a `Box` that need not begin and end between two pixels

_WARP_SIDE = 32_766  # pixels: the longest side that OpenCV 4 takes in warpAffine


def resize(
    image: np.ndarray,
    size: tuple[int, int],
    interpolation: Interpolation = "bilinear",
    box: Box | PartBox | None = None,
) -> np.ndarray:
    """`uint8 [H, W, C]` -> `uint8 [*size, C]`: the box of it, or all, brought to `size`.

    Where there is nothing to do the result shares the image's memory.
    """
    top, left, height, width = (0, 0, *image.shape[:2]) if box is None else box
    first_row, first_column = math.floor(top), math.floor(left)
    image = image[first_row : math.ceil(top + height), first_column : math.ceil(left + width)]
    inside = (top - first_row, left - first_column, height, width)
    method = _bicubic if interpolation == "bicubic" else _bilinear
    return method(image, size, inside).reshape(*size, image.shape[2])


def _bilinear(image: np.ndarray, size: tuple[int, int], box: PartBox) -> np.ndarray:
    top, left, height, width = box
    shrinks = [old / new for old, new in zip((height, width), size, strict=True)]
    points = [max(1, math.ceil(shrink / 2)) for shrink in shrinks]  # in each new pixel, down and across
    weights = [min(max(shrink - 1, 0), 1) / 4 for shrink in shrinks]
    if any(weights):
        down, across = (np.array([weight, 1 - 2 * weight, weight], np.float32) for weight in weights)
        image = cv2.sepFilter2D(image, -1, across, down, borderType=cv2.BORDER_REPLICATE)
    few = max(points) == 1
    # where one side shrinks by much, the other grows after it: a thin image would otherwise take all of the memory
    rows, columns = (
        new * count if few or shrink > 1 else old
        for new, count, shrink, old in zip(size, points, shrinks, image.shape[:2], strict=True)
    )
    if image.shape[:2] != (height, width) and max(image.shape[:2]) <= _WARP_SIDE:
        step_down, step_across = height / rows, width / columns  # between the middles of the points
        places = np.array([[step_across, 0, left + step_across / 2 - 0.5], [0, step_down, top + step_down / 2 - 0.5]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        image = cv2.warpAffine(image, places, (columns, rows), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    elif image.shape[:2] != (rows, columns):
        image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR)
    if not few:
        image = cv2.resize(image, (columns // points[1], rows // points[0]), interpolation=cv2.INTER_AREA)
    return image if image.shape[:2] == size else cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)


def _bicubic(image: np.ndarray, size: tuple[int, int], box: PartBox) -> np.ndarray:
    top, left, height, width = box
    if image.shape[:2] == (height, width) == size:
        return image
    edges = (left, top, min(left + width, image.shape[1]), min(top + height, image.shape[0]))  # float sums may pass it
    layers = [image] if image.shape[2] == 3 else [image[..., channel] for channel in range(image.shape[2])]
    resized = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(layer)).resize((size[1], size[0]), Image.Resampling.BICUBIC, edges)
        )
        for layer in layers
    ]
    return resized[0] if len(resized) == 1 else np.stack(resized, axis=-1)

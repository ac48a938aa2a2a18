"""A box of an image -> the size that the model wants, antialiased. Everything is uint8 `[H, W, C]`.

Bilinear is OpenCV's: by linear interpolation to the nearest whole multiple of the new size, then the mean of each
new pixel's block. That is within one grey level of the mean over the exact area, which takes up to three times as long.
Bicubic is Pillow's, which is what published evaluations were run with, and takes about four times as long as bilinear.
"""

import math
from typing import Literal

import cv2
import numpy as np
from PIL import Image

Interpolation = Literal["bilinear", "bicubic"]
Box = tuple[int, int, int, int]  # top, left, height and width in pixels
PartBox = tuple[float, float, float, float]  # the same, where it need not begin and end between two pixels

cv2.setNumThreads(1)  # batches are prepared side by side; threads within a resize would only get in their way


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
    rows, columns = (new * max(1, int(old / new + 0.5)) for old, new in zip((height, width), size, strict=True))
    if image.shape[:2] != (height, width):
        down, across = height / rows, width / columns  # where the middle of each new pixel lies among the old ones
        places = np.array([[across, 0, left + across / 2 - 0.5], [0, down, top + down / 2 - 0.5]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        image = cv2.warpAffine(image, places, (columns, rows), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    elif image.shape[:2] != (rows, columns):
        image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_LINEAR)
    if (rows, columns) != size:
        image = cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_AREA)
    return image


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

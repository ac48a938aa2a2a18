"""Chooses the box of an image that the model sees: a random box in training, the centre in evaluation.

The host draws boxes by `random_crop`. On the device, `vit_dist.step.augment` draws the boxes of a batch from the same
distribution.
"""

import math

import numpy as np

from vit_dist.config import Interval

Box = tuple[int, int, int, int]  # top, left, height and width in pixels
TRIES = 10  # boxes that are drawn before `largest_box` is taken


def random_crop(height: int, width: int, area: Interval, aspect: Interval, rng: np.random.Generator) -> Box:
    """Returns the box of a random resized crop ("Inception crop", Szegedy et al. 2015, arXiv:1409.4842).

    Args:
      height: the image's height in pixels.
      width: the image's width in pixels.
      area: interval from which the box's share of the image's area is drawn uniformly.
      aspect: interval from which the box's width / height is drawn, uniformly in the logarithm.
      rng: draws the numbers.

    Returns:
      The first of `TRIES` drawn boxes that fits, at a random position in the image, or `largest_box` if none fits.
      These are torchvision's rules (`RandomResizedCrop`).
    """
    return random_box(height, width, area, aspect, rng) or largest_box(height, width, aspect)


def random_box(height: int, width: int, area: Interval, aspect: Interval, rng: np.random.Generator) -> Box | None:
    """Returns a box as `random_crop` does, or None if none of the drawn boxes fits."""
    for _ in range(TRIES):
        box_area = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_width, box_height = round(math.sqrt(box_area * ratio)), round(math.sqrt(box_area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = rng.integers(height - box_height + 1), rng.integers(width - box_width + 1)
            return int(top), int(left), box_height, box_width
    return None


def largest_box(height: int, width: int, aspect: Interval) -> Box:
    """Returns the largest centred box whose width / height is in the interval `aspect`."""
    ratio = min(max(width / height, aspect[0]), aspect[1])
    box_width, box_height = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def centre_box(height: int, width: int, size: tuple[int, int], ratio: float) -> Box:
    """Returns the centred box whose sides are `ratio` of those of the largest box of `size`'s shape that fits.

    For a square `size`, the box's side is `ratio` of the image's short side: 224/256 is the usual evaluation crop.
    """
    scale = ratio * min(height / size[0], width / size[1])
    box_height, box_width = (max(1, min(side, round(scale * new))) for side, new in zip((height, width), size))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width

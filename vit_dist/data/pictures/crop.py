"""Which box of an image is looked at: a random one in training, the middle in evaluation.

This is the one law of it. The host draws boxes by `random_crop`; `vit_dist.step.augment` draws a whole batch of them by
the same law on the device.
"""

import math

import numpy as np

from vit_dist.config import Interval

Box = tuple[int, int, int, int]  # top, left, height and width in pixels
TRIES = 10  # boxes that are drawn before an image is taken to have none that fits


def random_crop(height: int, width: int, area: Interval, aspect: Interval, rng: np.random.Generator) -> Box:
    """Returns the box of a random resized crop ("Inception crop", Szegedy et al. 2015, arXiv:1409.4842).

    Args:
      height: of the image, in pixels.
      width: of the image, in pixels.
      area: the box's share of the image is drawn evenly from this interval.
      aspect: its width over its height is drawn from this one, evenly in the logarithm.
      rng: where the numbers come from.

    Returns:
      The first of `TRIES` boxes that fits into the image, anywhere within it, or else `largest_box`. These are
      torchvision's rules (`RandomResizedCrop`).
    """
    return random_box(height, width, area, aspect, rng) or largest_box(height, width, aspect)


def random_box(height: int, width: int, area: Interval, aspect: Interval, rng: np.random.Generator) -> Box | None:
    """As `random_crop`, but None where none of the boxes fits."""
    for _ in range(TRIES):
        box_area = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_width, box_height = round(math.sqrt(box_area * ratio)), round(math.sqrt(box_area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = rng.integers(height - box_height + 1), rng.integers(width - box_width + 1)
            return int(top), int(left), box_height, box_width
    return None


def largest_box(height: int, width: int, aspect: Interval) -> Box:
    """The largest centred box of an image whose aspect lies in the interval."""
    ratio = min(max(width / height, aspect[0]), aspect[1])
    box_width, box_height = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def centre_box(height: int, width: int, size: tuple[int, int], ratio: float) -> Box:
    """The middle of the image, at `ratio` of the largest box of `size`'s shape that fits.

    For a square `size` that is `ratio` of the short side: 224/256 is the usual evaluation crop.
    """
    scale = ratio * min(height / size[0], width / size[1])
    box_height, box_width = (max(1, min(side, round(scale * new))) for side, new in zip((height, width), size))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width

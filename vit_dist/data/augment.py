"""Random crop and flip of one decoded image, on the host, as pure functions of the image and a random generator.

The generator is made from the seed and the example's place in the stream, so what happens to an image does not depend
on which process, thread or host meets it. (Shifts and warps happen on the device, as does all augmentation of sets
that lie in memory: `vit_dist.step.augment`.)
"""

import math

import numpy as np

from vit_dist.config import Interval
from vit_dist.data.images import resize

_CROP_TRIES = 10


def generator(seed: int, position: int) -> np.random.Generator:
    """The random numbers of the example at global `position` of the stream: 2**64 words of Philox set apart for it."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, position, 0, 0]))


def random_resized_crop(
    image: np.ndarray, size: tuple[int, int], area: Interval, aspect: Interval, rng: np.random.Generator
) -> np.ndarray:
    """A random box of the image, brought to `size`: `uint8 [H, W, C]` -> `uint8 [*size, C]`.

    `area` is the box's share of the image, drawn evenly; `aspect` its width over height, drawn evenly in the logarithm
    ("Inception crop", Szegedy et al. 2015, arXiv:1409.4842). After ten boxes that do not fit, the largest centred box
    whose aspect lies in the interval.
    """
    top, left, height, width = crop_box(image.shape[0], image.shape[1], area, aspect, rng)
    return resize(image[top : top + height, left : left + width], size)


def crop_box(
    height: int, width: int, area: Interval, aspect: Interval, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """`(top, left, height, width)` of the box that `random_resized_crop` takes, in pixels."""
    for _ in range(_CROP_TRIES):
        box_area = height * width * rng.uniform(*area)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        box_width, box_height = round(math.sqrt(box_area * ratio)), round(math.sqrt(box_area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = rng.integers(height - box_height + 1), rng.integers(width - box_width + 1)
            return int(top), int(left), box_height, box_width
    ratio = min(max(width / height, aspect[0]), aspect[1])
    box_width, box_height = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image, or one time in two its mirror image (left to right)."""
    return image[:, ::-1] if rng.random() < 0.5 else image

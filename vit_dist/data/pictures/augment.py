"""Augments one decoded image at random on the host, by pure functions of the image and a random generator.

The generator is made from the seed and the example's position in the stream, so the result does not depend on which
process, thread or host works on the image. The loader crops and resizes; `augment_image` does everything after that.
(The device shifts and warps. It also crops and flips sets in memory that need no other augmentation; see
`vit_dist.step.augment`.)

We draw the random numbers, in an order of our own; OpenCV and NumPy change the pixels (`color`, `randaugment`).
Libraries considered instead: albumentations (unmaintained since June 2025; its successor AlbumentationsX is AGPL or
paid), imgaug (last release 2020, fails under NumPy 2), AugLy (memes and overlays, no RandAugment), torchvision, timm
and kornia (torch), Keras (torch, TensorFlow or jax underneath), DALI (a pipeline with an order and seeds of its own).
Pillow has most of the operations, and the tests compare with it, but it takes 3 to 20 times as long; scikit-image works
in float64.
"""

import functools
import math
import statistics
from typing import Any

import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.libraries import cv2
from vit_dist.data.pictures import color, crop
from vit_dist.data.pictures.randaugment import randaugment

_HOST_ONLY = ("three_augment", "randaugment_layers", "color_jitter", "hue_jitter", "erase")  # keys of `config.Data`
_ERASED_AREA, _ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
_NOISE_MEAN, _NOISE_STD = 128, 64


class _Key(np.random.bit_generator.ISeedSequence):
    """Passes a key to Philox unchanged. `Philox(key=...)` does the same, but takes 7 us, mostly to gather entropy."""

    def __init__(self, key: int) -> None:
        self._words = key % 2**64, key // 2**64

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return np.array(self._words, np.uint64)  # Philox asks for two words of 64 bits


_key = functools.lru_cache(maxsize=16)(_Key)


def generator(seed: int, position: int) -> np.random.Generator:
    """Returns the generator of the example at global `position` of the stream: 2**64 words of Philox of its own."""
    key: Any = _key(seed)  # NumPy's annotations ask for a SeedSequence, its code for an ISeedSequence
    return np.random.Generator(np.random.Philox(key, counter=position << 64))


def augment_image(image: np.ndarray, data: config.Data, rng: np.random.Generator) -> np.ndarray:
    """Applies the augmentations of the config that follow crop and resize: `uint8 [H, W, C]` -> `uint8 [H, W, C]`.

    Their order is that of published recipes: flip, 3-Augment (DeiT III), RandAugment (AugReg, DeiT), colour jitter,
    erasing. The result can be the image itself or share its memory; the image is not written to.
    """
    if data.flip:
        image = random_flip(image, rng)
    if data.three_augment:
        image = three_augment(image, rng)
    if data.randaugment_layers:
        image = randaugment(image, data.randaugment_layers, data.randaugment_magnitude, data.randaugment_std, rng)
    if data.color_jitter or data.hue_jitter:
        image = color.color_jitter(image, data.color_jitter, data.hue_jitter, rng)
    return random_erase(image, data.erase, rng) if data.erase else image


def on_device(data: config.Data, *, in_memory: bool) -> bool:
    """Returns whether the device crops and flips, so that the host passes images uncropped; see `data.augment_on`.

    Args:
      data: the config's section.
      in_memory: whether the images are pixels in memory, so that a batch is one gather.

    Raises:
      ConfigError: the config demands the device, but the images are files or need an augmentation of the host.
    """
    host_only = [name for name in _HOST_ONLY if getattr(data, name)]
    if data.augment_on == "device":
        if host_only:
            raise ConfigError(
                f"data.augment_on: device, but data.{host_only[0]} is done by the host alone; set one of them"
            )
        if not in_memory:
            raise ConfigError(
                "data.augment_on: device, but the images are files, which the host decodes and crops; set "
                "data.in_memory=true or data.augment_on=auto"
            )
    return data.augment_on != "host" and in_memory and not host_only


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirrors the image left to right with probability 1/2."""
    return cv2.flip(image, 1).reshape(image.shape) if rng.random() < 0.5 else image


def three_augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Makes the image gray, solarises it from 128 up, or blurs it by 0.1 to 2 pixels, each with probability 1/3.

    ("3-Augment", Touvron et al. 2022, arXiv:2204.07118; its colour jitter is `data.color_jitter=0.3`.)
    """
    choice = rng.integers(3)
    if choice == 0:
        return color.gray(image)
    if choice == 1:
        return color.solarize(image, 128)
    return color.blur(image, rng.uniform(0.1, 2.0))


def random_erase(image: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Returns the image, or with `probability` a copy with a box of noise in it (Zhong et al. 2020, arXiv:1708.04896).

    The box has 2 to 33 % of the area and an aspect of 0.3 to 3.3; if ten drawn boxes do not fit, nothing is erased.
    Each value in it is drawn independently from N(128, 64), cut off at 0 and 255. This is timm's mode `pixel`, which
    draws N(0, 1) after the usual normalisation, that is about N(mean, std) of ImageNet's pixels: N(124, 58),
    N(116, 57) and N(104, 57). It does not use `data.mean` and `data.std`: at 0.5 these are a range, not the statistics
    of images.
    """
    if rng.random() >= probability:
        return image
    box = crop.random_box(image.shape[0], image.shape[1], _ERASED_AREA, _ERASED_ASPECT, rng)
    if box is None:
        return image
    top, left, height, width = box
    shape = height, width, image.shape[2]
    noise = cv2.LUT(np.frombuffer(rng.bytes(math.prod(shape)), np.uint8), _noise_levels()).reshape(shape)
    image = image.copy()
    image[top : top + height, left : left + width] = noise
    return image


@functools.cache
def _noise_levels() -> np.ndarray:
    """Returns 256 equally likely values of the noise, `uint8 [256]`, since to draw normals takes ten times as long."""
    normal = statistics.NormalDist(_NOISE_MEAN, _NOISE_STD)
    levels = [normal.inv_cdf((i + 0.5) / 256) for i in range(256)]
    return np.array(levels).round().clip(0, 255).astype(np.uint8)

"""What happens at random to one decoded image on the host, as pure functions of the image and a random generator.

The generator is made from the seed and the example's place in the stream, so what happens to an image does not depend
on which process, thread or host meets it. The loader crops and resizes; `changes` is all that follows. (Shifts and
warps happen on the device, as do crop and flip of sets in memory that ask for no more: `vit_dist.step.augment`.)

The draws and their order are ours, the work on pixels is OpenCV's and NumPy's (`color`, `randaugment`). Considered in
its place: albumentations (unmaintained since June 2025; its successor AlbumentationsX is AGPL or paid), imgaug (last
release 2020, fails under NumPy 2), AugLy (memes and overlays, no RandAugment), torchvision, timm and kornia (torch),
Keras (torch, TensorFlow or jax underneath), DALI (a pipeline with an order and seeds of its own). Pillow has most of
the operations and is what the tests compare with, but takes 3 to 20 times as long; scikit-image works in float64.
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

_HOST_ALONE = ("three_augment", "randaugment_layers", "color_jitter", "hue_jitter", "erase")  # keys of `config.Data`
_ERASED_AREA, _ERASED_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
_NOISE_MEAN, _NOISE_STD = 128, 64


class _Key(np.random.bit_generator.ISeedSequence):
    """A Philox key given as it is. `Philox(key=...)` does the same in 7 us, most of them spent asking for entropy."""

    def __init__(self, key: int) -> None:
        self._words = key % 2**64, key // 2**64

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return np.array(self._words, np.uint64)  # what Philox asks for: two words of 64 bits


_key = functools.lru_cache(maxsize=16)(_Key)


def generator(seed: int, position: int) -> np.random.Generator:
    """The random numbers of the example at global `position` of the stream: 2**64 words of Philox set apart for it."""
    key: Any = _key(seed)  # NumPy's annotations ask for a SeedSequence, its code for an ISeedSequence
    return np.random.Generator(np.random.Philox(key, counter=position << 64))


def changes(image: np.ndarray, data: config.Data, rng: np.random.Generator) -> np.ndarray:
    """All that is asked for after crop and resize, `uint8 [H, W, C]` -> `uint8 [H, W, C]`, in the order of recipes.

    Flip; 3-Augment (DeiT III) or RandAugment (AugReg, DeiT), or the one and then the other; colour jitter; erasing.
    The result may be the image itself or share its memory; the image is not written to.
    """
    if data.flip:
        image = random_flip(image, rng)
    if data.three_augment:
        image = three_augment(image, rng)
    if data.randaugment_layers:
        layers, magnitude, std = data.randaugment_layers, data.randaugment_magnitude, data.randaugment_std
        image = randaugment(image, layers, magnitude, std, rng)
    if data.color_jitter or data.hue_jitter:
        image = color.color_jitter(image, data.color_jitter, data.hue_jitter, rng)
    return random_erase(image, data.erase, rng) if data.erase else image


def on_device(data: config.Data, *, in_memory: bool) -> bool:
    """Whether the device crops and flips, and the host hands it whole images; see `data.augment_on`.

    in_memory: the images are pixels in memory, of which a batch is one gather. Raises `ConfigError` where the device is
    asked for and cannot.
    """
    host_alone = [name for name in _HOST_ALONE if getattr(data, name)]
    if data.augment_on == "device":
        if host_alone:
            raise ConfigError(
                f"data.augment_on: device, but data.{host_alone[0]} is done by the host alone; set one of them"
            )
        if not in_memory:
            raise ConfigError(
                "data.augment_on: device, but the images are files, which the host decodes and crops; set "
                "data.in_memory=true or data.augment_on=auto"
            )
    return data.augment_on != "host" and in_memory and not host_alone


def random_flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The image, or one time in two its mirror image (left to right)."""
    return cv2.flip(image, 1).reshape(image.shape) if rng.random() < 0.5 else image


def three_augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of three, as likely as one another: gray, solarised from 128 up, or blurred by 0.1 to 2 pixels.

    ("3-Augment", Touvron et al. 2022, arXiv:2204.07118; its colour jitter is `data.color_jitter=0.3`.)
    """
    which = rng.integers(3)
    if which == 0:
        return color.gray(image)
    if which == 1:
        return color.solarize(image, 128)
    return color.blur(image, rng.uniform(0.1, 2.0))


def random_erase(image: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """The image, or with `probability` a copy with one box of noise (Zhong et al. 2020, arXiv:1708.04896).

    The box has 2 to 33 % of the area and an aspect of 0.3 to 3.3; where ten such do not fit, there is none. Each of its
    values is drawn alone from N(128, 64), cut off at 0 and 255. This is timm's mode `pixel`, which draws N(0, 1)
    behind the usual normalisation, that is about N(mean, std) of ImageNet's pixels: N(124, 58), N(116, 57) and
    N(104, 57). It does not follow `data.mean` and `data.std`: those of 0.5 are a range, not what images are like.
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
    """256 equally likely values of the noise, `uint8 [256]`: a byte looked up here takes a tenth of a normal's time."""
    normal = statistics.NormalDist(_NOISE_MEAN, _NOISE_STD)
    levels = [normal.inv_cdf((i + 0.5) / 256) for i in range(256)]
    return np.array(levels).round().clip(0, 255).astype(np.uint8)

"""One example as the model is to see it: read, decoded, cropped, resized and augmented.

What happens to an example depends on the seed and its place in the stream alone: see `augment.generator`.
"""

import dataclasses
import time
from functools import partial

import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.pictures import augment, crop, images, jpeg
from vit_dist.data.sets.examples import ArraySource, FileSource, Source
from vit_dist.data.stream.bad_examples import BadExample, check_none_bad
from vit_dist.data.stream.timings import Timings

_PAUSES_S = (0.1, 1.0, 5.0)  # before another try to read
_OF_THE_FILE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_OF_THE_NETWORK = (ConnectionError, TimeoutError)


def augments_on_device(source: Source, data: config.Data) -> bool:
    """Whether images come at their own size and as they are, for the device to crop, resize and augment.

    Raises `ConfigError` as `augment.on_device`.
    """
    return augment.on_device(data, in_memory=isinstance(source, ArraySource))


def evaluation_image(encoded: bytes, data: config.Data, size: tuple[int, int], channels: int) -> np.ndarray:
    """An encoded image as evaluation sees it, whole or its centre (`data.eval_crop`): `uint8 [*size, channels]`.

    Raises `images.BadImage`.
    """
    return images.decode_box(encoded, channels, _evaluation_box(data, size), size, data.interpolation, data.crop_decode)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Reads examples of a source as pixels of `image_size` and `channels`. Can be pickled."""

    source: Source
    data: config.Data
    image_size: tuple[int, int]
    channels: int

    def __post_init__(self) -> None:
        if isinstance(self.source, ArraySource):
            have = self.source.images.shape[-1]
            if not images.convertible(have, self.channels):
                raise ConfigError(f"model.channels: {self.channels}, but the images of this source have {have}")
        elif self.channels not in images.CHANNELS:
            raise ConfigError(f"model.channels: {self.channels}, but image files are decoded to 1 or 3")
        elif self.data.crop_decode:
            jpeg.crop_codec()

    def empty(self, rows: int) -> np.ndarray:
        """Room for so many images, `uint8 [rows, H, W, C]`."""
        return np.empty((rows, *self.image_size, self.channels), np.uint8)

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """Pixels of examples in memory, at their own size."""
        assert isinstance(self.source, ArraySource)
        return images.convert_channels(np.take(self.source.images, ids, axis=0), self.channels)

    def augmented(self, index: int, seed: int, position: int, stages: Timings) -> np.ndarray | BadExample:
        """An example as training sees it at this place of the stream, or what is wrong with it if it may be skipped."""
        data, rng = self.data, augment.generator(seed, position)
        choose: images.Choose = images.whole
        if data.crop_area is not None:
            choose = partial(crop.random_crop, area=data.crop_area, aspect=data.crop_aspect, rng=rng)
        image = self._image(index, choose, stages)
        if isinstance(image, BadExample):
            return image
        with stages.timed("augment"):
            return augment.changes(image, data, rng)

    def plain(self, index: int, stages: Timings) -> np.ndarray | BadExample:
        """An example as evaluation sees it, or what is wrong with it where that may be skipped."""
        return self._image(index, _evaluation_box(self.data, self.image_size), stages)

    def _image(self, index: int, choose: images.Choose, stages: Timings) -> np.ndarray | BadExample:
        source, data = self.source, self.data
        if isinstance(source, ArraySource):
            with stages.timed("decode"):
                image = images.convert_channels(source.images[index], self.channels)
                top, left, height, width = choose(*image.shape[:2])
                return images.resize(
                    image[top : top + height, left : left + width], self.image_size, data.interpolation
                )
        try:
            with stages.timed("read"):
                encoded = _read(source, index)
            with stages.timed("decode"):
                return images.decode_box(
                    encoded, self.channels, choose, self.image_size, data.interpolation, data.crop_decode
                )
        except (images.BadImage, OSError) as error:
            bad = BadExample(index, source.name(index), str(error))
            if data.on_bad == "error":
                check_none_bad([bad])
            return bad


def _read(source: FileSource, index: int) -> bytes:
    """The encoded bytes. Raises `OSError` where the fault is the file's, `ConfigError` where the disk or network fails.

    A file that cannot be read just now is not a bad one: to pass over it would make this run another than it is.
    """
    for pause in (*_PAUSES_S, 0.0):
        try:
            return source.read(index)
        except OSError as error:
            if isinstance(error, _OF_THE_FILE) or (error.errno is None and not isinstance(error, _OF_THE_NETWORK)):
                raise
            reason = error
        time.sleep(pause)
    raise ConfigError(
        f"{source.name(index)}: cannot be read ({reason}), {len(_PAUSES_S) + 1} times over; see to the disk or "
        "network, then start the run again: it goes on from its last checkpoint"
    ) from reason


def _evaluation_box(data: config.Data, size: tuple[int, int]) -> images.Choose:
    return images.whole if data.eval_crop is None else partial(crop.centre_box, size=size, ratio=data.eval_crop)

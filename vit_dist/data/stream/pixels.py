"""Reads, decodes, crops, resizes and augments one example.

The result depends on the example, the seed and the position in the stream alone: see `augment.generator`.
"""

import dataclasses
import time
from functools import partial

import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.pictures import augment, crop, crop_modes, images, jpeg
from vit_dist.data.sets.examples import ArraySource, FileSource, Source
from vit_dist.data.stream.bad_examples import BadExample, check_none_bad
from vit_dist.data.stream.timings import Timings

_PAUSES_S = (0.1, 1.0, 5.0)  # before reading is tried again
_FILE_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_NETWORK_ERRORS = (ConnectionError, TimeoutError)


def augments_on_device(source: Source, data: config.Data) -> bool:
    """Returns whether the device crops, resizes and augments the images, so that the host leaves them unchanged.

    Raises `ConfigError` as `augment.on_device`.
    """
    return augment.on_device(data, in_memory=isinstance(source, ArraySource))


def evaluation_image(encoded: bytes, data: config.Data, size: tuple[int, int], channels: int) -> np.ndarray:
    """Decodes an image and brings it to the model's size, as for evaluation: `uint8 [*size, channels]`.

    Raises `images.BadImage`.
    """
    if data.eval_crop_mode == "fast":
        choose = _evaluation_box(data, size)
        return images.decode_box(encoded, channels, choose, size, data.interpolation, data.crop_decode)
    return evaluation_pixels(images.decode(encoded, channels), data, size)


def evaluation_pixels(image: np.ndarray, data: config.Data, size: tuple[int, int]) -> np.ndarray:
    """Brings a decoded image `uint8 [H, W, C]` to the model's size, as for evaluation.

    Returns `uint8 [*size, C]`, which may share the image's memory if it has that size already.
    """
    if data.eval_crop_mode == "fast":
        return images.resize(image, size, data.interpolation, _evaluation_box(data, size)(*image.shape[:2]))
    fill = crop_modes.fill_levels(data.mean, image.shape[2])
    ratio = data.eval_crop or 1.0
    return crop_modes.fit(image, size, data.eval_crop_mode, ratio, data.eval_rounding, data.interpolation, fill)


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Reads the examples of a source as pixels of `image_size` and `channels`. Can be pickled.

    Raises `ConfigError` if the source's images cannot be converted to `channels`, or `data.crop_decode` lacks its
    library.
    """

    source: Source
    data: config.Data
    image_size: tuple[int, int]
    channels: int

    def __post_init__(self) -> None:
        if isinstance(self.source, ArraySource):
            source_channels = self.source.images.shape[-1]
            if not images.convertible(source_channels, self.channels):
                raise ConfigError(
                    f"model.channels: {self.channels}, but the images of this source have {source_channels}"
                )
        elif self.channels not in images.CHANNELS:
            raise ConfigError(f"model.channels: {self.channels}, but image files are decoded to 1 or 3")
        elif self.data.crop_decode:
            jpeg.crop_codec()

    def empty(self, rows: int) -> np.ndarray:
        """Returns an uninitialised array for `rows` images, `uint8 [rows, H, W, C]`."""
        return np.empty((rows, *self.image_size, self.channels), np.uint8)

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """Returns the examples `ids` of a source in memory, at their own size: `uint8 [n, h, w, C]`."""
        assert isinstance(self.source, ArraySource)
        return images.convert_channels(np.take(self.source.images, ids, axis=0), self.channels)

    def augmented(self, index: int, seed: int, position: int, timings: Timings) -> np.ndarray | BadExample:
        """Reads and augments an example for training.

        Args:
          index: the example's id.
          seed: the run's seed.
          position: global position in the stream, which with the seed determines the augmentation.
          timings: the seconds spent are added to it.

        Returns:
          `uint8 [H, W, C]`, or the bad example if `data.on_bad=skip`.

        Raises:
          TooManyBadExamples: the example is bad and may not be skipped.
          ConfigError: the disk or the network fails.
        """
        data, rng = self.data, augment.generator(seed, position)
        choose: images.ChooseBox = images.full_box
        if data.crop_area is not None:
            choose = partial(crop.random_crop, area=data.crop_area, aspect=data.crop_aspect, rng=rng)
        image = self._image(index, choose, timings)
        if isinstance(image, BadExample):
            return image
        with timings.timed("augment"):
            return augment.augment_image(image, data, rng)

    def plain(self, index: int, timings: Timings) -> np.ndarray | BadExample:
        """Reads an example for evaluation; returns and raises as `augmented`."""
        return self._image(index, None, timings)

    def _image(self, index: int, choose: images.ChooseBox | None, timings: Timings) -> np.ndarray | BadExample:
        """Reads an example, and resizes the chosen box of it; as for evaluation without `choose`."""
        source, data, size, channels = self.source, self.data, self.image_size, self.channels
        if isinstance(source, ArraySource):
            with timings.timed("decode"):
                image = images.convert_channels(source.images[index], channels)
                if choose is None:
                    return evaluation_pixels(image, data, size)
                return images.resize(image, size, data.interpolation, choose(*image.shape[:2]))
        try:
            with timings.timed("read"):
                encoded = _read(source, index)
            with timings.timed("decode"):
                if choose is None:
                    return evaluation_image(encoded, data, size, channels)
                return images.decode_box(encoded, channels, choose, size, data.interpolation, data.crop_decode)
        except (images.BadImage, OSError) as error:
            bad = BadExample(index, source.name(index), str(error))
            if data.on_bad == "error":
                check_none_bad([bad])
            return bad


def _read(source: FileSource, index: int) -> bytes:
    """Returns an example's encoded bytes.

    Raises `OSError` if the file is at fault, `ConfigError` if the disk or network still fails after some retries. A
    file that cannot be read at the moment is not a bad example: to skip it would change the result of the run.
    """
    for pause in (*_PAUSES_S, 0.0):
        try:
            return source.read(index)
        except OSError as error:
            if isinstance(error, _FILE_ERRORS) or (error.errno is None and not isinstance(error, _NETWORK_ERRORS)):
                raise
            reason = error
        time.sleep(pause)
    raise ConfigError(
        f"{source.name(index)}: cannot be read ({reason}), {len(_PAUSES_S) + 1} times over; see to the disk or "
        "network, then start the run again: it goes on from its last checkpoint"
    ) from reason


def _evaluation_box(data: config.Data, size: tuple[int, int]) -> images.ChooseBox:
    return images.full_box if data.eval_crop is None else partial(crop.centre_box, size=size, ratio=data.eval_crop)

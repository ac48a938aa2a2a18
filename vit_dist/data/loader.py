"""Batches of a source, prepared ahead of time by threads or worker processes (Grain).

The stream is a Grain dataset whose elements are whole batches, numbered by step, and a batch is a pure function of
`(seed, step, rows)`. So it does not matter who makes it, hosts need not talk, and a run is resumed by starting at
another step: the loader has no state to save.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np
from absl import flags

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data import augment, images
from vit_dist.data.order import example_ids
from vit_dist.data.sources import ArraySource, FileSource, Source

_log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
PADDING_ID = -1  # of the rows that fill up the last batch of an evaluation


class Bad(NamedTuple):
    """An example that could not be read or decoded."""

    id: int
    name: str
    reason: str


class Batches(Iterator[Batch]):
    """The iterator that `train_batches` and `evaluation_batches` return; `bad` lists what was skipped so far.

    It ends its threads and processes when it is exhausted, raises or is closed.
    """

    def __init__(self, dataset: grain.IterDataset, data: config.Data, examples: int) -> None:
        self._iterator = iter(dataset)
        self._max_bad_fraction, self._examples = data.max_bad_fraction, examples
        self._closed = False
        self.bad: list[Bad] = []

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        try:
            batch, bad = next(self._iterator)
            self._note(bad)
        except BaseException:
            self.close()
            raise
        return batch

    def close(self) -> None:
        self._closed = True
        self._iterator.close()

    def _note(self, found: list[Bad]) -> None:
        known = {bad.id for bad in self.bad}
        for bad in found:
            if bad.id not in known:
                known.add(bad.id)
                self.bad.append(bad)
                _log.warning("skipped %s: %s", bad.name, bad.reason)
        _check_bad(self.bad, self._max_bad_fraction, self._examples)


def train_batches(
    source: Source,
    data: config.Data,
    *,
    image_size: tuple[int, int],
    channels: int,
    seed: int,
    batch_size: int,
    rows: slice,
    start_step: int,
    stop_step: int,
) -> Batches:
    """Rows `rows` of the global batch of every step in `[start_step, stop_step)`.

    A batch is `image` `uint8 [b, H, W, C]`, `label` `int32 [b]`, `id` `int32 [b]`. Files are cropped, flipped and
    resized to `image_size` here, as `data.crop_area` and `data.flip` say; pixels in memory come whole and at their own
    size, for the device to augment. An example that does not decode is, with `data.on_bad=skip`, replaced by the next
    that does. Raises `ConfigError` for what cannot be skipped.
    """
    if not len(source):
        raise ConfigError("the train split holds no examples")
    make = _TrainBatch(_Loader(source, data, image_size, channels), seed, batch_size, rows)
    return _batches(make, range(start_step, stop_step), source, data)


def evaluation_batches(
    source: Source, data: config.Data, *, image_size: tuple[int, int], channels: int, batch_size: int, rows: slice
) -> Batches:
    """Rows `rows` of the batches that hold every example of the source once, in the order of ids.

    As `train_batches`, without augmentation and with `mask` `bool [b]`: False for the zero images (of label 0 and id
    -1) that fill the last batch, and for files that were skipped. Every host gets as many batches.
    """
    make = _EvaluationBatch(_Loader(source, data, image_size, channels), batch_size, rows)
    return _batches(make, range(-(-len(source) // batch_size)), source, data)


def evaluation_image(image: np.ndarray, crop: float | None, size: tuple[int, int]) -> np.ndarray:
    """`uint8 [H, W, C]` -> `[*size, C]` as evaluation sees it: the whole image, or its centre (`data.eval_crop`)."""
    return images.resize(image, size) if crop is None else images.center_crop_resize(image, size, crop)


@dataclasses.dataclass(frozen=True)
class _Loader:
    """Reads examples of a source as pixels. Sent to the worker processes, so it must be picklable."""

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

    def gather(self, ids: np.ndarray) -> np.ndarray:
        """Pixels of examples in memory, at their own size."""
        assert isinstance(self.source, ArraySource)
        return images.convert_channels(np.take(self.source.images, ids, axis=0), self.channels)

    def decode(self, index: int) -> np.ndarray | Bad:
        """An encoded example at its own size, or what is wrong with it where that may be skipped."""
        assert isinstance(self.source, FileSource)
        try:
            return images.decode(self.source.read(index), self.channels)
        except (images.BadImage, OSError) as error:
            bad = Bad(index, self.source.name(index), str(error))
            if self.data.on_bad == "error":
                raise ConfigError(f"{bad.name}: {error}; repair or remove it, or set data.on_bad=skip") from error
            return bad


@dataclasses.dataclass(frozen=True)
class _TrainBatch:
    loader: _Loader
    seed: int
    batch_size: int
    rows: slice

    def __call__(self, step: int) -> tuple[Batch, list[Bad]]:
        source, bad = self.loader.source, list[Bad]()
        positions = step * self.batch_size + np.arange(self.batch_size)[self.rows]
        ids = example_ids(self.seed, len(source), positions)
        if isinstance(source, ArraySource):
            pixels = self.loader.gather(ids)
        else:
            pixels = np.empty((len(ids), *self.loader.image_size, self.loader.channels), np.uint8)
            for row, position in enumerate(positions):
                image, ids[row] = self._readable(int(ids[row]), bad)
                pixels[row] = self._augment(image, int(position))
        return {"image": pixels, "label": source.labels[ids], "id": ids.astype(np.int32)}, bad

    def _readable(self, index: int, bad: list[Bad]) -> tuple[np.ndarray, int]:
        """The first example from `index` on that decodes, and its id; the others are added to `bad`."""
        examples, run = len(self.loader.source), list[Bad]()
        while isinstance(found := self.loader.decode(index), Bad):
            run.append(found)
            _check_bad(run, self.loader.data.max_bad_fraction, examples)
            index = (index + 1) % examples
        bad += run
        return found, index

    def _augment(self, image: np.ndarray, position: int) -> np.ndarray:
        data, size = self.loader.data, self.loader.image_size
        rng = augment.generator(self.seed, position)
        if data.crop_area is None:
            image = images.resize(image, size)
        else:
            image = augment.random_resized_crop(image, size, data.crop_area, data.crop_aspect, rng)
        return augment.random_flip(image, rng) if data.flip else image


@dataclasses.dataclass(frozen=True)
class _EvaluationBatch:
    loader: _Loader
    batch_size: int
    rows: slice

    def __call__(self, step: int) -> tuple[Batch, list[Bad]]:
        source, size, bad = self.loader.source, self.loader.image_size, list[Bad]()
        ids = step * self.batch_size + np.arange(self.batch_size)[self.rows]
        mask = ids < len(source)
        if isinstance(source, ArraySource):
            pixels = self.loader.gather(np.where(mask, ids, 0))
        else:
            pixels = np.zeros((len(ids), *size, self.loader.channels), np.uint8)
            for row in np.flatnonzero(mask):
                image = self.loader.decode(int(ids[row]))
                if isinstance(image, Bad):
                    bad.append(image)
                    mask[row] = False
                else:
                    pixels[row] = evaluation_image(image, self.loader.data.eval_crop, size)
        pixels[~mask] = 0
        labels = np.where(mask, source.labels[np.where(mask, ids, 0)], 0).astype(np.int32)
        ids = np.where(mask, ids, PADDING_ID).astype(np.int32)
        return {"image": pixels, "label": labels, "id": ids, "mask": mask}, bad


def _batches(
    make: Callable[[int], tuple[Batch, list[Bad]]], steps: range, source: Source, data: config.Data
) -> Batches:
    """Makes the batches of `steps` ahead of time, at most `data.threads` of them in each process, in order."""
    threads = data.threads if isinstance(source, FileSource) else 1  # a gather is too short to share out
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=data.threads)
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(make).to_iter_dataset(options)
    if data.workers and isinstance(source, FileSource):  # pixels in memory need no decoding, and would be copied
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain hands its flags on to the workers, and we do not use absl's parser
        multiprocessing = grain.multiprocessing.MultiprocessingOptions(data.workers, per_worker_buffer_size=1)
        dataset = dataset.mp_prefetch(multiprocessing)
    return Batches(dataset, data, len(source))


def _check_bad(bad: list[Bad], max_bad_fraction: float, examples: int) -> None:
    """Raises `ConfigError` where these different examples are more than may be skipped, or all there are."""
    if bad and len(bad) > min(max_bad_fraction * examples, examples - 1):
        raise ConfigError(
            f"data.max_bad_fraction: {len(bad)} of {examples} files did not decode, {max_bad_fraction:g} of them may; "
            f"the last is {bad[-1].name}: {bad[-1].reason}"
        )

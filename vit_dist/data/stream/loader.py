"""Batches of a source, made ahead of time by threads (Grain's) or by worker processes.

The stream is a Grain dataset of pieces of batches, numbered in order, and a piece is a pure function of `(seed, step,
rows)`. So it does not matter who makes it, hosts need not talk, and a run is resumed by starting at another step: the
loader has no state to save. What is made ahead is bounded in bytes, for a batch may be large.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from vit_dist import config
from vit_dist.config import ConfigError
from vit_dist.data.sets.examples import ArraySource, FileSource, Source
from vit_dist.data.stream.bad_examples import BadExample, check_bad
from vit_dist.data.stream.order import Order
from vit_dist.data.stream.pixels import Pixels, augments_on_device
from vit_dist.data.stream.timings import Timings
from vit_dist.data.stream.workers import Workers

HostBatch = dict[str, np.ndarray]
Piece = tuple[HostBatch, list[BadExample], Timings]
PADDING_ID = -1  # of the rows that fill up the last batch of an evaluation
_PIECE_ROWS = 32  # images that one thread makes at a time
_MOST_PIECES = 256  # ahead; of small images the bytes allow more, but who waits for them?
_MOST_GATHERS = 8  # likewise, of whole batches from memory


class Pieces(Protocol):
    def __next__(self) -> Piece: ...
    def close(self) -> None: ...


class Batches(Iterator[HostBatch]):
    """The iterator that `train_batches` and `evaluation_batches` return; to be closed.

    `stages` sums what its `parallel` threads or processes have spent on what. It ends them when it is exhausted,
    raises or is closed.
    """

    def __init__(self, pieces: Pieces, starts: range, rows: int, parallel: int) -> None:
        """A batch of `rows` rows is made of pieces that begin at `starts`, so many of them at a time."""
        self._pieces = pieces
        self._close = weakref.finalize(self, pieces.close)  # at the latest when it is dropped, or at the exit
        self._starts, self._rows = starts, rows
        self._closed = False
        self._made = 0
        self._bad: dict[int, tuple[int, BadExample]] = {}
        self.parallel = parallel
        self.stages = Timings()

    def __next__(self) -> HostBatch:
        if self._closed:
            raise StopIteration
        try:
            self._made += 1
            if len(self._starts) == 1:
                return self._next_piece()
            return self._assemble()
        except BaseException:
            self.close()
            raise

    def bad(self, batches: int | None = None) -> list[BadExample]:
        """The examples skipped in the first so many batches, or in all that were made so far; each once."""
        found = list(self._bad.values())  # at once: another thread may be adding to them
        return [bad for number, bad in found if batches is None or number <= batches]

    def close(self) -> None:
        self._closed = True
        self._close()

    def _assemble(self) -> HostBatch:
        batch: HostBatch = {}
        for start in self._starts:
            piece = self._next_piece()
            with self.stages.timed("copy"):
                for name, rows in piece.items():
                    if name not in batch:
                        batch[name] = np.empty((self._rows, *rows.shape[1:]), rows.dtype)
                    batch[name][start : start + len(rows)] = rows
        return batch

    def _next_piece(self) -> HostBatch:
        piece, found, stages = next(self._pieces)
        self.stages.add(stages)
        for bad in found:
            self._bad.setdefault(bad.id, (self._made, bad))
        return piece


def train_batches(
    source: Source,
    data: config.Data,
    *,
    image_size: tuple[int, int],
    channels: int,
    seed: int,
    batch_size: int,
    rows: Sequence[int] | np.ndarray,
    start_step: int,
    stop_step: int,
) -> Batches:
    """Rows `rows` of the global batch of every step in `[start_step, stop_step)`.

    A batch is `image` `uint8 [b, H, W, C]`, `label` `int32 [b]`, `id` `int32 [b]`. Images are cropped, resized to
    `image_size` and augmented here, as the config says; where the device augments (`augments_on_device`) they keep
    their own size. An example that does not decode is, with `data.on_bad=skip`, replaced by the next that does.
    Raises `ConfigError` for what cannot be skipped.
    """
    if not len(source):
        raise ConfigError("the train split holds no examples")
    sizes = tuple(size for size, _ in source.mixture) or (len(source),)
    weights = tuple(weight for _, weight in source.mixture) or None
    order = Order(seed, sizes, weights, data.repeats)
    make = _TrainPiece(Pixels(source, data, image_size, channels), order, batch_size)
    return _batches(make, make.pixels, range(start_step, stop_step), rows)


def evaluation_batches(
    source: Source,
    data: config.Data,
    *,
    image_size: tuple[int, int],
    channels: int,
    batch_size: int,
    rows: Sequence[int] | np.ndarray,
) -> Batches:
    """Rows `rows` of the batches that hold every example of the source once, in the order of ids.

    As `train_batches`, without augmentation and with `mask` `bool [b]`: False for the zero images (of label 0 and id
    -1) that fill the last batch, and for files that do not decode. These are skipped whatever `data.on_bad` says, so
    that every host gets as many batches; what `Batches.bad` lists is for the caller to refuse.
    """
    data = dataclasses.replace(data, on_bad="skip")
    make = _EvaluationPiece(Pixels(source, data, image_size, channels), batch_size)
    return _batches(make, make.pixels, range(-(-len(source) // batch_size)), rows)


@dataclasses.dataclass(frozen=True)
class _TrainPiece:
    """Makes rows of a training batch. Sent to the worker processes, so it must be picklable."""

    pixels: Pixels
    order: Order
    batch_size: int

    def __call__(self, step: int, rows: np.ndarray) -> Piece:
        positions = step * self.batch_size + rows
        ids, bad, stages = self.order.ids(positions), list[BadExample](), Timings()
        if augments_on_device(self.pixels.source, self.pixels.data):
            with stages.timed("read"):
                images = self.pixels.gather(ids)
        else:
            images = self.pixels.empty(len(ids))
            for row, position in enumerate(positions):
                ids[row] = self._fill(images, row, int(ids[row]), int(position), bad, stages)
        return {"image": images, "label": self.pixels.source.labels[ids], "id": ids.astype(np.int32)}, bad, stages

    def _fill(
        self, images: np.ndarray, row: int, index: int, position: int, bad: list[BadExample], stages: Timings
    ) -> int:
        """Puts the first example from `index` on that decodes into `images[row]`; returns its id.

        Those passed over are added to `bad`.
        """
        examples, run = len(self.pixels.source), list[BadExample]()
        while isinstance(found := self.pixels.augmented(index, self.order.seed, position, stages), BadExample):
            run.append(found)
            check_bad(run, self.pixels.data.max_bad_fraction, examples)  # or it would go round for ever
            index = (index + 1) % examples
        bad += run
        images[row] = found
        return index


@dataclasses.dataclass(frozen=True)
class _EvaluationPiece:
    pixels: Pixels
    batch_size: int

    def __call__(self, step: int, rows: np.ndarray) -> Piece:
        source, bad, stages = self.pixels.source, list[BadExample](), Timings()
        ids = step * self.batch_size + rows
        mask = ids < len(source)
        known = np.where(mask, ids, 0)
        if augments_on_device(source, self.pixels.data):
            images = self.pixels.gather(known)
        else:
            images = self.pixels.empty(len(ids))
            for row in np.flatnonzero(mask):
                image = self.pixels.plain(int(ids[row]), stages)
                if isinstance(image, BadExample):
                    bad.append(image)
                    mask[row] = False
                else:
                    images[row] = image
        images[~mask] = 0
        labels = np.where(mask, source.labels[known], 0).astype(np.int32)
        ids = np.where(mask, ids, PADDING_ID).astype(np.int32)
        return {"image": images, "label": labels, "id": ids, "mask": mask}, bad, stages


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """Piece `number` of the stream: of which step it is, and which rows."""

    make: Callable[[int, np.ndarray], Piece]
    first_step: int
    rows: np.ndarray
    starts: range

    def __call__(self, number: int) -> Piece:
        step, piece = divmod(number, len(self.starts))
        start = self.starts[piece]
        return self.make(self.first_step + step, self.rows[start : start + self.starts.step])


def _batches(
    make: Callable[[int, np.ndarray], Piece], pixels: Pixels, steps: range, rows: Sequence[int] | np.ndarray
) -> Batches:
    """Makes the batches of `steps` ahead of time and in order, at most `data.read_ahead_mb` of their pixels."""
    source, data, local = pixels.source, pixels.data, np.asarray(rows)
    if augments_on_device(source, data):
        assert isinstance(source, ArraySource)
        piece, row_bytes, most = len(local), source.images[:1].nbytes, _MOST_GATHERS
        threads = 1  # a gather is too short to share out
    else:
        piece, row_bytes, most = _PIECE_ROWS, pixels.empty(1).nbytes, _MOST_PIECES
        threads = data.threads
    starts = range(0, len(local), piece)
    ahead = min(most, max(1, int(data.read_ahead_mb * 2**20 / (min(piece, len(local)) * row_bytes))))
    numbered, count = _Numbered(make, steps.start, local, starts), len(steps) * len(starts)
    if data.workers and isinstance(source, FileSource):
        return Batches(Workers(numbered, count, data.workers, ahead), starts, len(local), data.workers)
    import grain  # here: it imports jax, and worker processes, which import this module, need neither

    options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    pieces = iter(grain.MapDataset.range(count).map(numbered).to_iter_dataset(options))
    return Batches(pieces, starts, len(local), threads)

"""Makes the batches of a source ahead of time, by Grain's threads or by worker processes.

The stream is a Grain dataset of pieces of batches, numbered in order, and a piece is a pure function of `(seed, step,
rows)`. So any thread, process or host can make any piece, hosts need not communicate, and a run resumes by starting at
another step: the loader has no state to save. The amount made ahead is bounded in bytes, since a batch can be large.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
MakePiece = Callable[[np.ndarray], Piece]
PADDING_ID = -1  # id of the rows that fill up the last batch of an evaluation
_PIECE_ROWS = 32  # images that a thread makes at a time
_MOST_PIECES = 256  # made ahead: more, which `read_ahead_mb` would allow for small images, gain no speed
_MOST_GATHERS = 8  # likewise, for batches gathered from memory


class Pieces(Protocol):
    """An iterator over the pieces of a stream, which ends its threads or processes when it is closed."""

    def __next__(self) -> Piece: ...
    def close(self) -> None: ...


class Batches(Iterator[HostBatch]):
    """The iterator that `train_batches` and `evaluation_batches` return; the caller closes it.

    `timings` sums the seconds that the `parallel` threads or processes have spent. The iterator ends these when it is
    exhausted, raises an error or is closed.
    """

    def __init__(self, pieces: Pieces, starts: range, rows: int, parallel: int) -> None:
        """Assembles batches from pieces.

        Args:
          pieces: the pieces of all batches, in order.
          starts: the first row of each piece in its batch.
          rows: how many rows a batch has on this process.
          parallel: how many threads or processes make pieces at the same time.
        """
        self._pieces = pieces
        self._close = weakref.finalize(self, pieces.close)  # also runs when this is garbage, or at the program's exit
        self._starts, self._rows = starts, rows
        self._batches_made = 0
        self._bad: dict[int, tuple[int, BadExample]] = {}
        self.parallel = parallel
        self.timings = Timings()

    def __next__(self) -> HostBatch:
        if not self._close.alive:
            raise StopIteration
        try:
            self._batches_made += 1
            return self._next_piece() if len(self._starts) == 1 else self._assemble()
        except BaseException:
            self.close()
            raise

    def bad(self, batches: int | None = None) -> list[BadExample]:
        """Returns the examples skipped in the first `batches` batches, or in all that were made so far; each once."""
        skipped = list(self._bad.values())  # a copy, since another thread may be adding to them
        return [bad for number, bad in skipped if batches is None or number <= batches]

    def close(self) -> None:
        """Ends the threads or processes; the iterator is then exhausted."""
        self._close()

    def _assemble(self) -> HostBatch:
        batch: HostBatch = {}
        for start in self._starts:
            piece = self._next_piece()
            with self.timings.timed("copy"):
                for name, rows in piece.items():
                    if name not in batch:
                        batch[name] = np.empty((self._rows, *rows.shape[1:]), rows.dtype)
                    batch[name][start : start + len(rows)] = rows
        return batch

    def _next_piece(self) -> HostBatch:
        batch, bad_examples, timings = next(self._pieces)
        self.timings.add(timings)
        for bad in bad_examples:
            self._bad.setdefault(bad.id, (self._batches_made, bad))
        return batch


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
    """Makes this process's rows of the global batch of every step in `[start_step, stop_step)`.

    Args:
      source: the examples.
      data: the config's section: how images are cropped and augmented, and how many threads or processes do it.
      image_size: (height, width) to which images are resized. Images that the device will augment
        (`augments_on_device`) keep their own size.
      channels: of the images, 3 (RGB) or 1 (gray).
      seed: determines the order and the augmentations.
      batch_size: of the global batch.
      rows: this process's rows of the global batch.
      start_step: the first step.
      stop_step: the step after the last.

    Returns:
      An iterator over batches: `image` `uint8 [b, H, W, C]`, `label` `int32 [b]`, `id` `int32 [b]`, for b rows. With
      `data.on_bad=skip`, an example that does not decode is replaced by the next that does.

    Raises:
      ConfigError: the source is empty or has other channels, or, while iterating, an example cannot be skipped.
    """
    if not len(source):
        raise ConfigError("the train split holds no examples")
    sizes = tuple(size for size, _ in source.mixture) or (len(source),)
    weights = tuple(weight for _, weight in source.mixture) or None
    order = Order(seed, sizes, weights, data.repeats)
    pixels = Pixels(source, data, image_size, channels)
    batches = range(start_step * batch_size, stop_step * batch_size, batch_size)
    return _batches(partial(_train_piece, pixels, order), pixels, batches, rows)


def evaluation_batches(
    source: Source,
    data: config.Data,
    *,
    image_size: tuple[int, int],
    channels: int,
    batch_size: int,
    rows: Sequence[int] | np.ndarray,
    start: int = 0,
    stop: int | None = None,
) -> Batches:
    """Makes this process's rows of batches that contain every example of the source once, in the order of ids.

    Args and batches are those of `train_batches`; only ids from `start` to before `stop` (None: all) are taken. Images
    are not augmented. Batches also have `mask` `bool [b]`, False for the zero images (label 0, id -1) that fill the
    last batch and for files that do not decode. Such files are masked whatever `data.on_bad` is, so that every process
    makes equally many batches; the caller decides whether to accept the examples in `Batches.bad`.
    """
    pixels = Pixels(source, dataclasses.replace(data, on_bad="skip"), image_size, channels)
    stop = len(source) if stop is None else stop
    return _batches(partial(_evaluation_piece, pixels, stop), pixels, range(start, stop, batch_size), rows)


def _train_piece(pixels: Pixels, order: Order, positions: np.ndarray) -> Piece:
    """Makes the rows of training batches at global `positions` of the stream."""
    source, data = pixels.source, pixels.data
    ids, bad, timings = order.ids(positions), list[BadExample](), Timings()
    if augments_on_device(source, data):
        with timings.timed("read"):
            images = pixels.gather(ids)
    else:
        images = pixels.empty(len(ids))
        for row, position in enumerate(positions.tolist()):
            skipped: list[BadExample] = []
            while isinstance(image := pixels.augmented(int(ids[row]), order.seed, position, timings), BadExample):
                skipped.append(image)
                check_bad(skipped, data.max_bad_fraction, len(source))  # ends the loop if no example decodes
                ids[row] = (ids[row] + 1) % len(source)
            images[row] = image
            bad += skipped
    return {"image": images, "label": source.labels[ids], "id": ids.astype(np.int32)}, bad, timings


def _evaluation_piece(pixels: Pixels, stop: int, ids: np.ndarray) -> Piece:
    """Makes the rows of evaluation batches with these ids, masked from the id `stop` on."""
    source, bad, timings = pixels.source, list[BadExample](), Timings()
    mask = ids < stop
    valid_ids = np.where(mask, ids, 0)
    if augments_on_device(source, pixels.data):
        images = pixels.gather(valid_ids)
    else:
        images = pixels.empty(len(ids))
        for row in np.flatnonzero(mask):
            image = pixels.plain(int(ids[row]), timings)
            if isinstance(image, BadExample):
                bad.append(image)
                mask[row] = False
            else:
                images[row] = image
    images[~mask] = 0
    labels = np.where(mask, source.labels[valid_ids], 0).astype(np.int32)
    ids = np.where(mask, ids, PADDING_ID).astype(np.int32)
    return {"image": images, "label": labels, "id": ids, "mask": mask}, bad, timings


def _numbered_piece(make: MakePiece, batches: range, rows: np.ndarray, starts: range, number: int) -> Piece:
    """Makes piece `number` of the stream; the other arguments are those of `_batches` and `Batches`."""
    batch, piece = divmod(number, len(starts))
    start = starts[piece]
    return make(batches[batch] + rows[start : start + starts.step])


def _batches(make: MakePiece, pixels: Pixels, batches: range, rows: Sequence[int] | np.ndarray) -> Batches:
    """Makes batches in order and ahead of time, by at most `data.read_ahead_mb` of pixels.

    Args:
      make: makes the rows at some positions of the stream. Sent to the worker processes, so it must be picklable.
      pixels: of the source.
      batches: the position of the first row of each global batch.
      rows: this process's rows of the global batch.
    """
    source, data, local_rows = pixels.source, pixels.data, np.asarray(rows)
    if augments_on_device(source, data):
        assert isinstance(source, ArraySource)
        piece_rows, row_bytes, most = len(local_rows), source.images[:1].nbytes, _MOST_GATHERS
        threads = 1  # a gather takes too little time to divide it among threads
    else:
        piece_rows, row_bytes, most = _PIECE_ROWS, pixels.empty(1).nbytes, _MOST_PIECES
        threads = data.threads
    starts = range(0, len(local_rows), piece_rows)
    ahead = min(most, max(1, int(data.read_ahead_mb * 2**20 / (min(piece_rows, len(local_rows)) * row_bytes))))
    make_piece, count = partial(_numbered_piece, make, batches, local_rows, starts), len(batches) * len(starts)
    if data.workers and isinstance(source, FileSource):
        return Batches(Workers(make_piece, count, data.workers, ahead), starts, len(local_rows), data.workers)
    import grain  # not at the top: it imports jax, and worker processes, which import this module, need neither

    options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    pieces = iter(grain.MapDataset.range(count).map(make_piece).to_iter_dataset(options))
    return Batches(pieces, starts, len(local_rows), threads)

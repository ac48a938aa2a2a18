"""Computes features of every example of a split, once each, over the mesh: for the verb, and for evaluations of them.

Batches are read, padded and masked as in an evaluation. The rows come back to the host, complete and in the order of
ids on every process, so that what follows, such as a search for neighbours, needs no mesh.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vit_dist import config
from vit_dist.config import ConfigError, pair
from vit_dist.data.sets.examples import Source
from vit_dist.data.stream.bad_examples import BadExample, check_bad, check_none_bad
from vit_dist.data.stream.loader import Batches, evaluation_batches
from vit_dist.data.stream.pixels import augments_on_device
from vit_dist.job import preemption, processes
from vit_dist.mesh import feed, layout
from vit_dist.mesh.feed import Batch, Prefetch
from vit_dist.model.pooling import mean
from vit_dist.model.shape import shape_of
from vit_dist.model.vit import ViT
from vit_dist.run.failures import gather_bad_examples
from vit_dist.step.evaluation import evaluation_batch_size, model_input
from vit_dist.step.state import ModelFunction, Parameters

What = Literal["pooled", "cls", "mean", "tokens"]
WHATS: tuple[What, ...] = ("pooled", "cls", "mean", "tokens")

_log = logging.getLogger(__name__)


Note = Callable[[Sequence[BadExample]], object]  # called with what was skipped


def warn(bad: Sequence[BadExample]) -> None:
    """Logs examples that were skipped."""
    for example in bad:
        _log.warning("skipped %s: %s", example.name, example.reason)


class Rows(NamedTuple):
    """Examples of a split: `ids` int64 [n], `labels` int32 [n], `features` float32 [n, D], or [n, N, D] of tokens."""

    ids: np.ndarray
    labels: np.ndarray
    features: np.ndarray


class Extractor:
    """Computes features of one kind; compiles once, whatever number of splits and parameters it is used for.

    The kinds, of the output of the last block or of an earlier one:

    - "pooled": what the head classifies. Of an earlier block, as if the model ended there: with its own last norm,
      pooling and projections.
    - "cls": the class token.
    - "mean": the mean of the patches.
    - "tokens": all N tokens: class token, registers, then patches row by row.

    The last three come after the model's norm of tokens, where it has one (`model.pool_norm` before or both).

    Attributes:
      what: the kind.
      block: the number of the block.
      row_shape: the shape of an example's features.
      batch_size: of the batches, over all devices.
    """

    def __init__(
        self,
        settings: config.Config,
        function: ModelFunction,
        mesh: Mesh,
        what: str = "pooled",
        block: int | None = None,
    ):
        """Checks what is asked for.

        Args:
          settings: how images are prepared, and the batch size (`evaluate.batch_size`, else `batch_size`).
          function: the model.
          mesh: the devices.
          what: the kind of features.
          block: the number of a block, from 0; -1 is the last; None: the last.

        Raises:
          ConfigError: there is no such kind or block, or no class token.
        """
        shape = shape_of(function.settings)
        if what not in WHATS:
            raise ConfigError(f"what: expected one of {', '.join(WHATS)}, found {what!r}")
        if what == "cls" and not shape.class_token:
            raise ConfigError("what: cls, but the model has no class token; take pooled, mean or tokens")
        last = shape.depth - 1
        if block is not None and not -shape.depth <= block <= last:
            raise ConfigError(f"block: {block}, but the model has the blocks 0 to {last}; -1 is the last")
        self.settings, self.mesh, self.what, self.block = settings, mesh, what, last if block is None else block
        self.block %= shape.depth
        self.batch_size = feed.rounded_up(mesh, evaluation_batch_size(settings))
        pooled = function.settings.pre_logits or function.settings.output_projection or shape.pooled
        kinds: dict[str, tuple[int, ...]] = {"pooled": (pooled,), "tokens": (shape.tokens, shape.width)}
        self.row_shape = kinds.get(what, (shape.width,))
        blocks = None if self.block == last else self.block + 1

        def step(parameters: Parameters, batch: Batch, on_device: bool) -> tuple[jax.Array, jax.Array]:
            model = function.module(parameters)
            images = model_input(batch["image"], settings.data, function.settings, augment_on_device=on_device)
            found = _read_out(model, model.tokens(images, blocks=blocks), what)
            return layout.reshard(found, *(None,) * found.ndim), layout.reshard(batch["mask"], None)

        self._steps = {on: jax.jit(lambda p, b, on=on: step(p, b, on)) for on in (False, True)}
        self._compiled = set[tuple]()

    def batches(
        self, parameters: Parameters, source: Source, start: int = 0, stop: int | None = None, note: Note = warn
    ) -> Iterator[Rows]:
        """Yields the features of the examples with ids from `start` to before `stop`, each once, in order.

        Every process yields all rows. The mesh must be in use, and all processes call this together.

        Args:
          parameters: those of the model, on the mesh.
          source: the split, which all processes have opened.
          start: the first id.
          stop: the id after the last; None: all that the split has.
          note: is told which examples were skipped, after the last batch.

        Raises:
          TooManyBadExamples: on all processes, for a batch with a file that does not decode. If `data.on_bad` is "skip"
            such files are left out, and only too many of them are an error, after the last batch.
        """
        data = self.settings.data
        stop = len(source) if stop is None else stop
        batches = evaluation_batches(
            source,
            data,
            image_size=pair(self.settings.model.image_size),
            channels=self.settings.model.channels,
            batch_size=self.batch_size,
            rows=feed.local_rows(self.mesh, self.batch_size),
            start=start,
            stop=stop,
        )
        device_batches = Prefetch(batches, self.mesh, self.batch_size, data.prefetch)
        step = self._steps[augments_on_device(source, data)]
        with contextlib.closing(batches), contextlib.closing(device_batches):
            under_way: tuple[int, tuple[jax.Array, jax.Array]] | None = None
            for first, batch in zip(range(start, stop, self.batch_size), device_batches, strict=True):
                processes.alive()
                preemption.check_between_batches()
                self._compile_once(step, parameters, batch)
                following = first, step(parameters, batch)  # begins while the host takes the one before
                if under_way is not None:
                    yield self._rows(source, batches, stop, *under_way)
                under_way = following
            if under_way is not None:
                yield self._rows(source, batches, stop, *under_way)
            bad = gather_bad_examples(batches.bad())
        note(bad)
        check_bad(bad, data.max_bad_fraction, stop - start)

    def all(self, parameters: Parameters, source: Source, note: Note = warn) -> Rows:
        """Returns the features of a whole split, as `batches`. Raises `ConfigError` also if it holds no example."""
        parts = list(self.batches(parameters, source, note=note))
        if not parts:
            raise ConfigError("features: the split holds no examples")
        return Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _rows(
        self, source: Source, batches: Batches, stop: int, first: int, found: tuple[jax.Array, jax.Array]
    ) -> Rows:
        """Returns the rows of the batch that begins with the id `first`, without those that are masked."""
        features, mask = jax.device_get(found)
        there = min(self.batch_size, stop - first)
        if self.settings.data.on_bad == "error" and not mask[:there].all():  # the same on all processes
            check_none_bad(gather_bad_examples(batches.bad()))
        ids = first + np.flatnonzero(mask).astype(np.int64)
        return Rows(ids, source.labels[ids], features[mask])

    def _compile_once(self, step: Callable, parameters: Parameters, batch: Batch) -> None:
        key = (id(step), batch["image"].shape)
        if key not in self._compiled:
            processes.compile_together(step, parameters, batch)
            self._compiled.add(key)


def _read_out(model: ViT, x: jax.Array, what: str) -> jax.Array:
    """Returns the features [B, ...], float32, of tokens [B, N, D] that a block put out."""
    shape = model.shape
    if what == "pooled":
        return model.pooled(x)
    if what == "tokens":
        x = layout.reshard(x if model.norm is None else model.norm(x), "batch", None, None)
        return x[:, : shape.tokens].astype(jnp.float32)
    span = (0, 1) if what == "cls" else (shape.special, shape.tokens)
    return mean(x, *span, model.norm).astype(jnp.float32)

"""From the rows a process has read to global arrays on the mesh, a few batches ahead of the step.

Each process reads only the rows of the global batch that its own devices hold; together they are one array. Copies to
the devices are asynchronous, so a batch placed ahead of time has usually arrived when the step asks for it.
"""

import queue
import threading
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vit_dist.mesh import layout

Batch = dict[str, jax.Array]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How the first dimension of a batch is split over the mesh."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return NamedSharding(mesh, PartitionSpec(layout.batch_axes() or None))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of the global batch that this process's devices hold, in order, int64 [b].

    Several blocks of them where neighbours in the mesh are not of one process, as on a TPU slice, whose devices are
    ordered by the wires between them.
    """
    return _held(batch_sharding(mesh), batch_size)


def _held(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    places = sharding.addressable_devices_indices_map((batch_size,)).values()
    held = np.zeros(batch_size, bool)
    for place in places:
        assert place is not None
        held[place[0]] = True
    return np.flatnonzero(held)


def put(batch: Mapping[str, np.ndarray], sharding: NamedSharding, batch_size: int) -> Batch:
    """Local rows [b, ...] of each array -> global arrays [batch_size, ...] split as `sharding` says."""
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)  # the same, and several times quicker
    rows = _held(sharding, batch_size)

    def put(local: np.ndarray) -> jax.Array:
        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return local[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, block)

    return {name: put(local) for name, local in batch.items()}


class Prefetch:
    """Iterates over placed batches, which a thread of its own keeps `ahead` of the step; to be closed.

    `waited`: seconds that the caller has spent waiting for a batch so far. `copied`: seconds that the thread has spent
    handing batches to the devices.
    """

    def __init__(self, batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh, batch_size: int, ahead: int):
        self.waited = self.copied = 0.0
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(ahead)
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._fill, args=(batches, batch_sharding(mesh), batch_size), name="prefetch", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = self._ready.get()
        self.waited += time.perf_counter() - started
        if isinstance(batch, dict):
            return batch
        self._ready.put(batch)  # for whoever asks again
        if batch is None:
            raise StopIteration
        raise batch

    def close(self) -> None:
        """Ends the thread; batches that it has placed are dropped."""
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.1)  # room for what the thread is putting
            except queue.Empty:
                continue

    def _fill(self, batches: Iterator[Mapping[str, np.ndarray]], sharding: NamedSharding, batch_size: int) -> None:
        last: BaseException | None = None
        try:
            for batch in batches:
                begun = time.perf_counter()
                placed = put(batch, sharding, batch_size)
                self.copied += time.perf_counter() - begun
                self._ready.put(placed)
                if self._closing.is_set():
                    return
        except BaseException as error:  # not swallowed: it belongs to the caller, who meets it in `__next__`
            last = error
        self._ready.put(last)

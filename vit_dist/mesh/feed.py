"""Makes global arrays on the mesh from the rows that each process reads, a few batches ahead of the step.

Each process reads only the rows of the global batch that its own devices hold; together the processes' rows are one
array. Copies to the devices are asynchronous, so a batch that was put ahead of time has usually arrived when the step
needs it.
"""

import math
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
    """Returns the sharding of an array whose first dimension is the batch."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return NamedSharding(mesh, PartitionSpec(layout.batch_axes() or None))


def rounded_up(mesh: Mesh, batch_size: int) -> int:
    """Returns the smallest batch size from this on that gives every device as many rows."""
    shards = math.prod(mesh.shape[axis] for axis in layout.TABLE["batch"] if axis in mesh.shape)
    return -(-batch_size // shards) * shards


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of the global batch that this process's devices hold, in ascending order, int64 [b].

    The rows are several blocks if neighbours in the mesh belong to different processes, as on a TPU slice, whose
    devices are ordered by the links between them.
    """
    return _local_rows(batch_sharding(mesh), batch_size)


def _local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    held = np.zeros(batch_size, bool)
    for index in sharding.addressable_devices_indices_map((batch_size,)).values():
        assert index is not None
        held[index[0]] = True
    return np.flatnonzero(held)


def put(batch: Mapping[str, np.ndarray], sharding: NamedSharding, batch_size: int) -> Batch:
    """Copies this process's rows of a batch to its devices.

    Args:
      batch: arrays [b, ...] by name, with the rows of `local_rows`.
      sharding: the result's, as from `batch_sharding`.
      batch_size: the global batch size B.

    Returns:
      Global arrays [B, ...] by the same names.
    """
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)  # the same result, several times faster
    rows = _local_rows(sharding, batch_size)

    def global_array(local: np.ndarray) -> jax.Array:
        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return local[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *local.shape[1:]), sharding, shard)

    return {name: global_array(local) for name, local in batch.items()}


class Prefetch:
    """Iterates over batches on the devices; a thread of its own puts them there, `ahead` of the step. Call `close`.

    `waited`: seconds that the caller has waited for a batch so far. `copied`: seconds that the thread has spent putting
    batches on the devices.
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
        self._ready.put(batch)  # for the next call
        if batch is None:
            raise StopIteration
        raise batch

    def close(self) -> None:
        """Ends the thread and drops the batches that it has put on the devices."""
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.1)  # makes room, so that the thread's `put` returns
            except queue.Empty:
                continue

    def _fill(self, batches: Iterator[Mapping[str, np.ndarray]], sharding: NamedSharding, batch_size: int) -> None:
        last: BaseException | None = None
        try:
            for batch in batches:
                started = time.perf_counter()
                global_batch = put(batch, sharding, batch_size)
                self.copied += time.perf_counter() - started
                self._ready.put(global_batch)
                if self._closing.is_set():
                    return
        except BaseException as error:  # not swallowed: `__next__` raises it to the caller
            last = error
        self._ready.put(last)

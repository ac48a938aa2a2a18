"""Reads a saved step and tells whether it is whole.

A process holds no more than it asks for: `load` reads the shards of its devices, `verify` a few chunks at a time.
"""

import concurrent.futures
import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from vit_dist.mesh import digests
from vit_dist.run import step_record
from vit_dist.run.state_digests import described, tensors_of
from vit_dist.run.step_record import Damaged, Record
from vit_dist.weights.saved_tree import SavedTree, Unreadable

_THREADS = 8  # that read tensors, or chunks of them
Index = tuple[slice, ...]


def structure(folder: Path, record: Record | None, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Returns the tensors of trees of a step: name of a tree -> path of a tensor -> type and shape.

    Raises `Damaged` for one that cannot be opened, and if they are not those of the step's record.
    """
    found = {
        name: {path: _described(tree.open(key)) for path, (tree, key) in _opened(folder, name).items()}
        for name in names
    }
    for name, tensors in found.items() if record is not None else ():
        assert record is not None
        described = {path: text.rpartition(" ")[0] for path, text in record.tensors.items()}
        saved = {path: text for path, text in described.items() if path.partition("/")[0] == name}
        for path in sorted(saved.keys() | tensors.keys()):
            if saved.get(path) != tensors.get(path):
                is_now, was = tensors.get(path, "missing"), saved.get(path, "none")
                raise Damaged(folder, f"tensor {path} is {is_now}, saved was {was}")
    return found


def bytes_of(folder: Path, name: str) -> int:
    """Returns the bytes that a tree takes in memory. Raises `Damaged` for a tensor that cannot be opened."""
    stores = [tree.open(key) for tree, key in _opened(folder, name).values()]
    return sum(math.prod(store.shape) * store.dtype.numpy_dtype.itemsize for store in stores)


def with_sharding(tensor: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Adds a sharding on this run's devices where there is none, and the mesh that is set to one that names none."""
    mesh = jax.sharding.get_mesh()
    sharding = tensor.sharding
    if sharding is None:
        sharding = SingleDeviceSharding(jax.local_devices()[0]) if mesh.empty else NamedSharding(mesh, PartitionSpec())
    elif isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, jax.sharding.AbstractMesh):
        sharding = NamedSharding(mesh, sharding.spec)
    return jax.ShapeDtypeStruct(tensor.shape, tensor.dtype, sharding=sharding)


def differences(saved: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """Returns a phrase for each tensor that keeps `saved` from being read as `wanted`."""
    missing = [f"has no tensor {path}" for path in wanted if path not in saved]
    extra = [f"has a tensor {path} that this run does not have" for path in saved if path not in wanted]
    other = [
        f"tensor {path} is {saved[path]}, expected {tensor}"
        for path, tensor in wanted.items()
        if saved.get(path, tensor) != tensor
    ]
    return missing + other + extra


def load(folder: Path, name: str, abstract: Any) -> Any:
    """Returns a tree of a step as arrays: this process reads what its own devices hold, and waits for no other.

    Args:
      folder: that of the step.
      name: that of the tree.
      abstract: the tree, of `jax.ShapeDtypeStruct`s with the shardings to read it with.

    Raises:
      Damaged: a tensor cannot be read.
    """
    opened, wanted = _opened(folder, name), tensors_of(name, abstract)

    def read(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        tree, key = opened[path]
        shards: dict[tuple, np.ndarray] = {}  # devices that hold the same share

        def of(index: Index | None) -> np.ndarray:
            place = tuple((one.start, one.stop) for one in index or ())
            if place not in shards:
                shards[place] = _read(folder, path, tree, key, index or ())
            return shards[place]

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, of)

    arrays = _all(read, wanted.items())
    return jax.tree.unflatten(jax.tree.structure(abstract), arrays)


def tensors(folder: Path, record: Record | None, name: str) -> dict[str, np.ndarray]:
    """Returns the tensors of a tree by name, such as `head.kernel`. Raises `Damaged` for one that is not whole."""

    def read(path: str, tree: SavedTree, key: str) -> np.ndarray:
        array = _read(folder, path, tree, key, ())
        if record is not None:
            _compare(folder, record, path, f"{described(array)} {digests.text(digests.of_numpy(array))}")
        return array

    opened = _opened(folder, name)
    arrays = _all(read, ((path, *at) for path, at in opened.items()))
    return {key: array for (_, key), array in zip(opened.values(), arrays, strict=True)}


def verify(folder: Path, record: Record | None, name: str, share: slice = slice(None)) -> None:
    """Reads the tensors of a tree, and compares their digests with the record's.

    Args:
      folder: that of the step.
      record: its record; None: it has none, so that only damage that keeps a tensor from being read is noticed.
      name: that of the tree.
      share: which of the tensors, where several processes share the work.

    Raises:
      Damaged: a tensor is not whole.
    """

    def part(path: str, tree: SavedTree, key: str, box: Index) -> digests.Digest:
        array, starts = _read(folder, path, tree, key, box), [one.start for one in box]
        return digests.of_numpy(array, tree.open(key).shape, starts)

    opened = dict(list(_opened(folder, name).items())[share])
    tasks = [(path, tree, key, box) for path, (tree, key) in opened.items() for box in _boxes(tree.open(key))]
    shares: dict[str, list[digests.Digest]] = {path: [] for path in opened}
    for (path, *_), digest in zip(tasks, _all(part, tasks), strict=True):
        shares[path].append(digest)
    for path, (tree, key) in opened.items():
        if record is not None:
            _compare(folder, record, path, f"{_described(tree.open(key))} {digests.text(digests.add(shares[path]))}")


def checked_record(folder: Path) -> Record | None:
    """Returns the record of a step, with whose files it agrees; None if it was saved without one.

    Raises `Damaged`, which names the tensor, too, where a file of numbers was changed.
    """
    record = step_record.read(folder)
    if record is None:
        return None
    try:
        step_record.check_files(folder, record)
    except Damaged as error:
        if error.missing or "/d/" not in error.reason:
            raise
        tensor = _first_bad_tensor(folder, record)
        raise Damaged(folder, error.reason if tensor is None else f"{tensor.reason} ({error.reason})") from error
    return record


def problem(folder: Path) -> Damaged | None:
    """Reads all of a step; returns what is damaged, or None. Only what can be told of a step without record is told."""
    try:
        record = checked_record(folder)
    except Damaged as error:
        return error
    return _first_bad_tensor(folder, record)


def _first_bad_tensor(folder: Path, record: Record | None) -> Damaged | None:
    try:
        for name in structure(folder, record, trees_of(folder)):
            verify(folder, record, name)
    except Damaged as error:
        return error
    return None


def compare(folder: Path, record: Record, found: dict[str, list[str]]) -> None:
    """Raises `Damaged` if tensors, as `StateDigests` describes those on the devices, are not those of the record."""
    for path, copies in found.items():
        for copy in copies:
            _compare(folder, record, path, copy)


def _compare(folder: Path, record: Record, path: str, found: str) -> None:
    if path not in record.tensors:
        raise Damaged(folder, f"tensor {path} is none of those that were saved")
    if record.tensors[path] != found:
        raise Damaged(folder, f"tensor {path} does not hold what was saved")


def trees_of(folder: Path) -> list[str]:
    """Returns the names of the trees of a step; Orbax keeps the metrics, which are no tensors, beside them.

    Raises `Damaged` if there is no such step.
    """
    try:
        return sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name != "metrics")
    except FileNotFoundError:
        raise Damaged(folder, "it is missing", missing=True) from None


def _opened(folder: Path, name: str) -> dict[str, tuple[SavedTree, str]]:
    """Returns the tensors of a tree: path -> the tree, and the tensor's name in it, which is open."""
    tree = SavedTree(folder / name)
    try:
        keys = tree.names()
    except Unreadable as error:
        raise Damaged(folder, f"{name}: {error.reason}", missing=error.missing) from error
    if not keys:
        raise Damaged(folder, f"{name} holds no tensors", missing=True)
    paths = {f"{name}/{key.replace('.', '/')}".removesuffix("/"): key for key in keys}

    def open_one(path: str, key: str) -> None:
        with _named(folder, path):
            tree.open(key)

    _all(open_one, paths.items())
    return {path: (tree, key) for path, key in paths.items()}


def _read(folder: Path, path: str, tree: SavedTree, key: str, index: Index) -> np.ndarray:
    with _named(folder, path):
        return np.asarray(tree.read(key, index))


@contextlib.contextmanager
def _named(folder: Path, path: str) -> Iterator[None]:
    try:
        yield
    except Unreadable as error:
        raise Damaged(folder, f"tensor {path}: {error.reason}", missing=error.missing) from error


def _all(call: Callable[..., Any], tasks: Iterable[Sequence[Any]]) -> list[Any]:
    """Returns the results of a call with each of these arguments, made in a few threads; the first error ends it."""
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(call, *task) for task in tasks]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()


def _described(store: Any) -> str:
    return f"{np.dtype(store.dtype.numpy_dtype).name}[{', '.join(map(str, store.shape))}]"


def _boxes(store: Any) -> Iterator[Index]:
    """Yields the chunks in which a tensor is stored."""
    chunk = store.chunk_layout.read_chunk.shape or store.shape
    steps = [range(0, size, max(1, length)) for size, length in zip(store.shape, chunk, strict=True)]
    for starts in itertools.product(*steps):
        ends = (min(start + length, size) for start, length, size in zip(starts, chunk, store.shape, strict=True))
        yield tuple(map(slice, starts, ends))

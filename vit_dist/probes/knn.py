"""Classifies by the k nearest neighbours in a set of features, which shows what these hold: nothing is learned.

The devices find a few more candidates than k in float32, and the host ranks these in float64. Devices take blocks of
one size, however many there are, so that neighbours are the same on any mesh. Each process classifies a share of the
queries, on its own devices.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_dist.job import processes

_QUERIES = 256  # rows of queries that a device compares at a time
_KEYS = 1 << 14  # rows of features that they are compared with at a time: a block of scores takes 16 MiB
_SPARE = 16  # candidates beyond k, since float32 may order near ones wrongly
_TINY = 1e-30  # a vector of zeros has similarity 0 to all


def predictions(
    features: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    ks: Sequence[int],
    *,
    metric: str = "cosine",
    temperature: float | None = 0.07,
    devices: Sequence[jax.Device] | None = None,
) -> list[np.ndarray]:
    """Returns the class of each query by its k nearest neighbours, int64 [m], for every k in `ks`.

    All processes of a job call this with the same arrays, and get the same result.

    Args:
      features: [n, D], of the examples whose classes are known.
      labels: their classes, [n], from 0.
      queries: [m, D].
      ks: how many neighbours vote, each at most n.
      metric: see `neighbours`.
      temperature: T of the votes exp(similarity / T), as in DINO (Caron et al. 2021, arXiv:2104.14294); None: all
        neighbours count alike. The class with the most votes wins, of several the one with the lowest number.
      devices: see `neighbours`.
    """
    process, count = jax.process_index(), jax.process_count()
    own = slice(len(queries) * process // count, len(queries) * (process + 1) // count)
    found, similarity = neighbours(features, queries[own], max(ks), metric=metric, devices=devices)
    classes = int(labels.max()) + 1
    voted = [_vote(labels[found[:, :k]], similarity[:, :k], temperature, classes) for k in ks]
    shares = processes.gather([each.tolist() for each in voted])
    return [np.concatenate([np.array(of_k, np.int64) for of_k in each]) for each in zip(*shares, strict=True)]


def neighbours(
    features: np.ndarray,
    queries: np.ndarray,
    k: int,
    *,
    metric: str = "cosine",
    devices: Sequence[jax.Device] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the k nearest features of each query, the nearest first, of equally near ones the first.

    Args:
      features: [n, D], n at least k.
      queries: [m, D].
      k: how many.
      metric: "cosine": the similarity is the cosine of the angle; "l2": minus half the squared distance, which differs
        from the cosine by 1 for vectors of length 1.
      devices: of this process, to search on; None: all it has.

    Returns:
      Their indices, int64 [m, k], and similarities, float64 [m, k].
    """
    if not len(queries):
        return np.zeros((0, k), np.int64), np.zeros((0, k))
    candidates = _candidates(features, queries, min(k + _SPARE, len(features)), metric, devices or jax.local_devices())
    similarity = np.empty(candidates.shape)
    for start in range(0, len(queries), _QUERIES):
        rows = slice(start, start + _QUERIES)
        near, query = features[candidates[rows]].astype(np.float64), queries[rows, None].astype(np.float64)
        if metric == "cosine":
            similarity[rows] = (_unit(near) * _unit(query)).sum(-1)
        else:
            similarity[rows] = -0.5 * ((near - query) ** 2).sum(-1)
    order = np.lexsort((candidates, -similarity))[:, :k]
    return np.take_along_axis(candidates, order, 1), np.take_along_axis(similarity, order, 1)


def _vote(labels: np.ndarray, similarity: np.ndarray, temperature: float | None, classes: int) -> np.ndarray:
    """Returns the class with the most votes, int64 [m], of the neighbours' classes and similarities [m, k]."""
    votes = np.ones(labels.shape)
    if temperature is not None:
        votes = np.exp((similarity - similarity[:, :1]) / temperature)  # the nearest has 1, so none is too large
    winners = np.empty(len(labels), np.int64)
    for start in range(0, len(labels), _QUERIES):
        rows = slice(start, start + _QUERIES)
        numbers = np.arange(len(labels[rows]))[:, None] * classes + labels[rows]
        sums = np.bincount(numbers.ravel(), votes[rows].ravel(), len(numbers) * classes)
        winners[rows] = sums.reshape(-1, classes).argmax(1)
    return winners


def _candidates(
    features: np.ndarray, queries: np.ndarray, count: int, metric: str, devices: Sequence[jax.Device]
) -> np.ndarray:
    """Returns the indices of the `count` nearest features by their scores in float32, int64 [m, count].

    All rows are moved by the features' mean, so that float32 resolves features that are nearly alike. Scores order as
    similarities do: those of a query differ from them by a constant.
    """
    mesh = Mesh(np.array(devices), ("queries",), axis_types=(AxisType.Explicit,))
    split, everywhere = NamedSharding(mesh, PartitionSpec("queries")), NamedSharding(mesh, PartitionSpec())

    def chosen(rows: np.ndarray) -> np.ndarray:
        return _unit(rows) if metric == "cosine" else rows.astype(np.float64)

    blocks = [slice(start, start + _KEYS) for start in range(0, len(features), _KEYS)]
    centre = sum(chosen(features[block]).sum(0) for block in blocks) / len(features)
    with jax.set_mesh(mesh):  # the caller's has other axes
        rows = -(-len(queries) // (len(devices) * _QUERIES)) * len(devices) * _QUERIES
        placed = jax.device_put(_padded(chosen(queries) - centre, rows), split)
        nothing = np.full((rows, count), -np.inf, np.float32), np.zeros((rows, count), np.int32)
        best = jax.device_put(nothing, split)
        size = min(_KEYS, -(-len(features) // 128) * 128)
        for block in blocks:
            moved = chosen(features[block]) - centre
            bias = moved @ centre if metric == "cosine" else -0.5 * (moved**2).sum(1)
            keys = jax.device_put((_padded(moved, size), _padded(bias, size, -np.inf)), everywhere)
            best = _nearer(best, placed, keys, np.int32(block.start), count=count)
        return np.asarray(best[1], np.int64)[: len(queries)]


@partial(jax.jit, static_argnames="count")
def _nearer(
    best: tuple[jax.Array, jax.Array],
    queries: jax.Array,
    keys: tuple[jax.Array, jax.Array],
    first: jax.Array,
    count: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the highest scores and their indices [m, count], of the best so far and of the keys with their bias.

    `first` is the index of the first key. Of equal scores, those with the lowest indices come first.
    """

    def block(
        best: tuple[jax.Array, jax.Array], rows: jax.Array, keys: jax.Array, bias: jax.Array, first: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        scores, which = jax.lax.top_k(jnp.matmul(rows, keys.T, precision="highest") + bias, min(count, len(keys)))
        scores, indices = jnp.concatenate([best[0], scores], 1), jnp.concatenate([best[1], which + first], 1)
        scores, which = jax.lax.top_k(scores, count)
        return scores, jnp.take_along_axis(indices, which, 1)

    def local(best: tuple[jax.Array, jax.Array], rows: jax.Array, *keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        split = jax.tree.map(lambda array: array.reshape(-1, _QUERIES, array.shape[1]), (best, rows))
        scores, indices = jax.lax.map(lambda one: block(*one, *keys), split)
        return scores.reshape(-1, count), indices.reshape(-1, count)

    split, whole = PartitionSpec("queries"), PartitionSpec()
    search = jax.shard_map(local, in_specs=(split, split, whole, whole, whole), out_specs=split)
    return search(best, queries, *keys, first)


def _unit(rows: np.ndarray) -> np.ndarray:
    """Returns vectors [..., D] of length 1, float64."""
    rows = rows.astype(np.float64)
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), _TINY)


def _padded(rows: np.ndarray, size: int, value: float = 0) -> np.ndarray:
    """Returns float32 [size, ...]; the rows that are added have this value."""
    edges = [(0, size - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
    return np.pad(rows.astype(np.float32), edges, constant_values=value)

"""A linear classifier on frozen features, at every strength of its L2 penalty, by one decomposition.

It is ridge regression of the classes, in closed form, as in big_vision's few-shot evaluation: with features x
standardised and targets y of 1 for an example's class and -1 for the others, W and b minimise

    mean |y - W x - b|^2 + l2 |W|^2

The host computes in float64, so nothing depends on a mesh. Which strength is best, is decided by the training examples
alone, which are left out in turn.
"""

from collections.abc import Iterator, Sequence

import numpy as np

_ROWS = 1 << 14  # examples at a time
_STD = 1e-5  # added to a feature's standard deviation, which may be 0
_FOLDS = 5


def predictions(features: np.ndarray, labels: np.ndarray, queries: np.ndarray, l2: Sequence[float]) -> list[np.ndarray]:
    """Returns the class of each query, int64 [m], by the classifier of each strength.

    Args:
      features: [n, D], of the training examples.
      labels: their classes, [n], from 0. A class without an example is never predicted.
      queries: [m, D]; of equal scores, the class with the lowest number wins.
      l2: strengths, above 0.
    """
    known, classes = np.unique(labels, return_inverse=True)
    n, mean = len(features), features.mean(0, dtype=np.float64)
    std = np.sqrt(sum(((features[rows] - mean) ** 2).sum(0) for rows in _chunks(n)) / n) + _STD
    if n < features.shape[1]:  # what is orthogonal to all examples has no weight
        turn = np.linalg.qr(((features - mean) / std).T)[0]
    else:
        turn = np.eye(features.shape[1])

    def standard(array: np.ndarray, turn: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        for rows in _chunks(len(array)):
            yield rows, ((array[rows] - mean) / std) @ turn

    offset = 2 * np.bincount(classes) / n - 1
    squares, products = np.zeros((turn.shape[1],) * 2), np.zeros((turn.shape[1], len(known)))
    for rows, x in standard(features, turn):
        targets = 2.0 * (classes[rows, None] == np.arange(len(known))) - 1
        squares += x.T @ x / n
        products += x.T @ (targets - offset) / n
    values, vectors = np.linalg.eigh(squares)
    turn, products = turn @ vectors, vectors.T @ products  # in these directions, features are uncorrelated
    weights = [products / (np.maximum(values, 0)[:, None] + strength) for strength in l2]
    found = [np.empty(len(queries), np.int64) for _ in l2]
    for rows, x in standard(queries, turn):
        for each, weight in zip(found, weights, strict=True):
            each[rows] = known[(x @ weight + offset).argmax(1)]
    return found


def strength(features: np.ndarray, labels: np.ndarray, l2: Sequence[float]) -> float:
    """Returns the strength that predicts best what it has not seen; of equally good ones, the greatest.

    Every fifth example of a class (of smaller classes, each) is left out, then the next, until all were. Where no class
    has two examples none can be left out: the middle one of the strengths is taken.
    """
    folds = min(_FOLDS, int(np.bincount(labels).max()))
    if folds < 2:
        return sorted(l2)[len(l2) // 2]
    by_class = np.argsort(labels, kind="stable")
    first = np.searchsorted(labels[by_class], labels[by_class])
    fold = np.empty(len(labels), np.int64)
    fold[by_class] = (np.arange(len(labels)) - first) % folds
    right = np.zeros(len(l2), np.int64)
    for number in range(folds):
        out = fold == number
        found = predictions(features[~out], labels[~out], features[out], l2)
        right += [int((each == labels[out]).sum()) for each in found]
    return max(zip(right.tolist(), l2, strict=True))[1]


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, count, _ROWS))

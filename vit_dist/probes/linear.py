"""A linear classifier on frozen features, at every strength of its L2 penalty, by one decomposition.

It is ridge regression of the classes, in closed form, as in big_vision's few-shot evaluation: with features x
standardised and targets y of 1 for an example's class and -1 for the others, W and b minimise

    mean |y - W x - b|^2 + l2 |W|^2

The host computes in float64, so nothing depends on a mesh. Which strength is best, is decided by the training examples
alone: each is predicted by the classifier of all others (leave-one-out), which has a closed form too.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

_ROWS = 1 << 14  # examples at a time
_STD = 1e-5  # added to a feature's standard deviation, which may be 0


class Fit(NamedTuple):
    """The classifier of one strength, as predictions of the queries, int64 [m], and how it predicts left-out examples:
    the share that is right, and the mean of |y - W x - b|^2."""

    l2: float
    predictions: np.ndarray
    held_out_top1: float
    held_out_error: float


def path(features: np.ndarray, labels: np.ndarray, queries: np.ndarray, l2: Sequence[float]) -> list[Fit]:
    """Returns the classifiers of each strength `l2`, in their order.

    Args:
      features: [n, D], of the training examples.
      labels: their classes, [n], from 0; at least two. A class without an example is never predicted.
      queries: [m, D], what to predict; of equal scores, the class with the lowest number.
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

    def targets(rows: slice) -> np.ndarray:
        return 2.0 * (classes[rows, None] == np.arange(len(known))) - 1

    values, vectors = np.linalg.eigh(sum(x.T @ x for _, x in standard(features, turn)) / n)
    turn = turn @ vectors  # in these directions, features are uncorrelated
    offset = 2 * np.bincount(classes) / n - 1
    covariance = sum(x.T @ (targets(rows) - offset) for rows, x in standard(features, turn)) / n
    shrunk = [np.maximum(values, 0)[:, None] + strength for strength in l2]
    weights = [covariance / each for each in shrunk]
    right, errors = np.zeros(len(l2)), np.zeros(len(l2))
    for rows, x in standard(features, turn):
        for number, weight in enumerate(weights):
            own_share = 1 / n + (x**2 / n) @ (1 / shrunk[number])  # of an example in its own prediction
            error = (targets(rows) - offset - x @ weight) / np.maximum(1 - own_share, np.finfo(float).eps)
            right[number] += ((targets(rows) - error).argmax(1) == classes[rows]).sum()
            errors[number] += (error**2).sum()
    predicted = [np.empty(len(queries), np.int64) for _ in l2]
    for rows, x in standard(queries, turn):
        for number, weight in enumerate(weights):
            predicted[number][rows] = known[(x @ weight + offset).argmax(1)]
    return [Fit(*each) for each in zip(l2, predicted, (right / n).tolist(), (errors / n).tolist(), strict=True)]


def best(fits: Sequence[Fit]) -> Fit:
    """Returns the fit that predicts left-out examples best: most of them right, then with the smallest error, then by
    the strongest penalty."""
    return max(fits, key=lambda fit: (fit.held_out_top1, -fit.held_out_error, fit.l2))


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, count, _ROWS))

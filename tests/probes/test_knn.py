"""Nearest neighbours are those of scikit-learn on the same features, on one device and on eight."""

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from vit_dist.probes import knn

METRICS = {"cosine": "cosine", "l2": "euclidean"}  # scikit-learn's names
DEVICES = {"1 device": 1, "8 devices": 8}


def examples(count, dimensions, seed):
    """Features float32 [count, dimensions] around seven points, and which: classes that overlap."""
    generator = np.random.default_rng(seed)
    points = np.random.default_rng(99).normal(size=(7, dimensions))
    labels = generator.integers(0, 7, count)
    return (points[labels] + 2.0 * generator.normal(size=(count, dimensions))).astype(np.float32), labels


TRAIN, LABELS = examples(900, 24, seed=1)
QUERIES, ANSWERS = examples(333, 24, seed=2)


def reference(k, metric, weights="uniform"):
    model = KNeighborsClassifier(k, metric=METRICS[metric], algorithm="brute", weights=weights)
    return model.fit(TRAIN.astype(np.float64), LABELS)


@pytest.mark.parametrize("devices", DEVICES)
@pytest.mark.parametrize("metric", METRICS)
def test_neighbours_and_their_order_are_those_of_scikit_learn(metric, devices):
    found, similarity = knn.neighbours(TRAIN, QUERIES, 20, metric=metric, devices=jax.devices()[: DEVICES[devices]])
    distances, expected = reference(20, metric).kneighbors(QUERIES.astype(np.float64))
    assert (found == expected).all()
    wanted = 1 - distances if metric == "cosine" else -0.5 * distances**2
    np.testing.assert_allclose(similarity, wanted, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("temperature", [None, 0.07])
def test_classes_are_those_of_scikit_learn_by_even_votes_and_by_dinos(temperature, metric):
    def weights(distances):
        similarity = 1 - distances if metric == "cosine" else -0.5 * distances**2
        return np.exp((similarity - similarity.max(1, keepdims=True)) / temperature)

    found = knn.predictions(TRAIN, LABELS, QUERIES, (1, 5, 20), metric=metric, temperature=temperature)
    for k, predicted in zip((1, 5, 20), found, strict=True):
        model = reference(k, metric, "uniform" if temperature is None else weights)
        assert (predicted == model.predict(QUERIES.astype(np.float64))).all()
        assert 0.3 < (predicted == ANSWERS).mean() < 0.95  # it is no easy task


def test_the_votes_of_dino_decide_otherwise_than_even_ones():
    (even,) = knn.predictions(TRAIN, LABELS, QUERIES, [20], temperature=None)
    (weighted,) = knn.predictions(TRAIN, LABELS, QUERIES, [20], temperature=0.07)
    assert 0 < (even != weighted).sum() < 100


def test_of_equal_votes_the_lowest_class_wins_and_of_equal_neighbours_the_first():
    features = np.array([[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]], np.float32)
    found, _ = knn.neighbours(features, np.array([[1, 1], [1, 0]], np.float32), 4)
    assert found.tolist() == [[0, 1, 2, 3], [0, 2, 4, 1]]
    labels = np.array([3, 2, 3, 2, 3])
    (winners,) = knn.predictions(features, labels, np.array([[1, 1]], np.float32), [4])
    assert winners.tolist() == [2]


@pytest.mark.parametrize("metric", METRICS)
def test_features_that_are_nearly_alike_are_told_apart(metric):
    """Their cosines differ by 1e-7, as of a model that has collapsed: float32 resolves 6e-8."""
    train, queries = 3000 + TRAIN, 3000 + QUERIES
    found, _ = knn.neighbours(train, queries, 20, metric=metric)
    near, far = queries.astype(np.float64), train.astype(np.float64)
    if metric == "cosine":
        near, far = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (near, far))
    distances = ((near[:, None] - far[None]) ** 2).sum(-1)  # of unit vectors, 2 - 2 cos
    expected = np.argsort(distances, axis=1, kind="stable")[:, :20]
    assert (found == expected).mean() > 0.999


def test_a_vector_of_zeros_is_at_right_angles_to_all():
    features = np.array([[0, 0], [1, 0.1], [-1, 0]], np.float32)
    found, similarity = knn.neighbours(features, np.array([[1, 0]], np.float32), 3)
    assert found.tolist() == [[1, 0, 2]]
    assert similarity[0, 1:].tolist() == [0, -1]


def test_features_and_queries_that_fill_no_block_and_several_are_searched_whole(monkeypatch):
    expected = knn.neighbours(TRAIN, QUERIES, 20)
    monkeypatch.setattr(knn, "_KEYS", 256)  # 900 are three blocks and a half
    for count in (1, 333):
        found = knn.neighbours(TRAIN, QUERIES[:count], 20)
        assert (found[0] == expected[0][:count]).all() and (found[1] == expected[1][:count]).all()
    all_of_them, _ = knn.neighbours(TRAIN, QUERIES, 900)
    assert (np.sort(all_of_them, 1) == np.arange(900)).all() and (all_of_them[:, :20] == expected[0]).all()


def test_no_queries_have_no_neighbours():
    (found,) = knn.predictions(TRAIN, LABELS, QUERIES[:0], [5])
    assert found.shape == (0,)

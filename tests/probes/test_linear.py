"""Linear classifiers are scikit-learn's ridge classifiers, at every strength."""

import inspect

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifier

from vit_dist.probes import linear

L2 = (1e-6, 1e-3, 0.1, 1.0, 10.0)
PIXELS, DIGITS = load_digits(return_X_y=True)
PIXELS = PIXELS.astype(np.float32)  # some pixels are 0 in every image
TEST = np.arange(len(DIGITS)) % 5 == 0
QUERIES, ANSWERS = PIXELS[TEST], DIGITS[TEST]


def reference(features, labels, queries, l2):
    mean, std = features.mean(0, dtype=np.float64), features.std(0, dtype=np.float64) + 1e-5
    model = RidgeClassifier(alpha=l2 * len(labels)).fit((features - mean) / std, labels)
    return model.predict((queries - mean) / std)


@pytest.mark.parametrize("count", [1437, 300, 40])  # of 64 features: also with fewer examples than features
def test_classes_are_those_of_scikit_learn_at_every_strength(count):
    features, labels = PIXELS[~TEST][:count], DIGITS[~TEST][:count]
    found = linear.predictions(features, labels, QUERIES, L2)
    for l2, predicted in zip(L2, found, strict=True):
        expected = reference(features, labels, QUERIES, l2)
        assert (predicted == expected).mean() >= 0.999
        assert abs((predicted == ANSWERS).mean() - (expected == ANSWERS).mean()) < 1e-3
    assert len({(predicted == ANSWERS).mean() for predicted in found}) > 1


@pytest.mark.parametrize("classes", [(3, 8), (0, 2, 7)])
def test_two_classes_do_and_those_without_an_example_are_never_predicted(classes):
    chosen = np.isin(DIGITS, classes) & ~TEST
    for predicted in linear.predictions(PIXELS[chosen], DIGITS[chosen], QUERIES, L2):
        assert set(predicted.tolist()) == set(classes)
    (predicted,) = linear.predictions(PIXELS[chosen], DIGITS[chosen], QUERIES, [0.1])
    assert (predicted == reference(PIXELS[chosen], DIGITS[chosen], QUERIES, 0.1)).all()


def test_the_strength_is_the_best_of_a_cross_validation_by_scikit_learn():
    strengths = set()
    for count in (60, 150, 1000):
        features, labels = PIXELS[~TEST][:count], DIGITS[~TEST][:count]
        fold = np.array([(labels[:index] == labels[index]).sum() % 5 for index in range(count)])
        right = {
            l2: sum(
                (reference(features[fold != n], labels[fold != n], features[fold == n], l2) == labels[fold == n]).sum()
                for n in range(5)
            )
            for l2 in L2
        }
        found = linear.strength(features, labels, L2)
        assert right[found] == max(right.values())
        strengths.add(found)
    assert len(strengths) > 1


def test_of_equally_good_strengths_the_greatest_is_taken_whatever_their_order():
    features = np.array([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]], np.float32)
    labels = np.array([0, 0, 0, 1, 1, 1])
    for l2 in ((1e-3, 0.1, 1e-2), (0.1, 1e-2, 1e-3)):
        assert linear.strength(features, labels, l2) == 0.1


def test_of_one_example_a_class_none_can_be_left_out_and_the_middle_strength_is_taken():
    features, labels = np.eye(3, dtype=np.float32), np.arange(3)
    assert linear.strength(features, labels, (10.0, 0.1, 1.0)) == 1.0


def test_the_strength_cannot_depend_on_what_is_classified():
    assert list(inspect.signature(linear.strength).parameters) == ["features", "labels", "l2"]


def test_the_examples_may_be_cut_in_any_way(monkeypatch):
    expected = linear.predictions(PIXELS[~TEST], DIGITS[~TEST], QUERIES, L2)
    monkeypatch.setattr(linear, "_ROWS", 100)
    found = linear.predictions(PIXELS[~TEST], DIGITS[~TEST], QUERIES, L2)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours == theirs).all()

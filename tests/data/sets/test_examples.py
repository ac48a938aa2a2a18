"""Fingerprints differ where the examples do, and classes that share a name are shown with their numbers."""

import dataclasses

import numpy as np
import pytest

from vit_dist.config import ConfigError
from vit_dist.data.sets import examples
from vit_dist.data.sets.examples import ArraySource, distinct_names, fingerprint
from vit_dist.data.sets.index import sorted_index


def test_classes_of_one_name_are_shown_with_their_numbers() -> None:
    assert distinct_names(("crane", "bee", "crane")) == ["crane (0)", "bee", "crane (2)"]


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("a", "a", "a (0)"), ["a (0) (0)", "a (1)", "a (0)"]),
        (("a", "a", "a (2)"), ["a (0)", "a (1)", "a (2)"]),
        (("a (1)", "a", "a", "a (1)"), ["a (1) (0)", "a (1) (1)", "a (2)", "a (1) (3)"]),
        (("a", "a", "a (0)", "a (0) (0)"), ["a (0) (0) (0)", "a (1)", "a (0)", "a (0) (0)"]),
    ],
)
def test_names_that_look_numbered_already_stay_distinct(names: tuple[str, ...], shown: list[str]) -> None:
    assert distinct_names(names) == shown and len({*shown}) == len(names)


@pytest.mark.parametrize("change", [(0, 0, 0, 0), (79, 1, 1, 2)])
def test_other_pixels_have_another_fingerprint(change: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 2, 2, 3), np.uint8)
    other = images.copy()
    other[change] ^= 1
    first, second = (ArraySource(pixels, np.zeros(80, np.int32), ("a",)) for pixels in (images, other))
    assert fingerprint(first) != fingerprint(second)
    again = dataclasses.replace(first, images=images.copy())
    for size in (1, 100, 1 << 24):  # a digest does not depend on how it is read
        monkeypatch.setattr(examples, "_DIGEST_CHUNK", size)
        assert fingerprint(again) == fingerprint(first)


def test_only_some_images_of_a_large_set_are_digested(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 2, 2, 3), np.uint8)
    source = ArraySource(images, np.zeros(80, np.int32), ("a",))
    monkeypatch.setattr(examples, "_DIGEST_LIMIT", images.nbytes // 8)
    before = fingerprint(source)
    images[1] ^= 1  # between two of those that are looked at
    assert fingerprint(source) == before
    images[8] ^= 1
    assert fingerprint(source) != before


def test_splits_whose_classes_have_one_name_twice_are_not_matched_by_it() -> None:
    names = ("crane", "bee", "crane")
    test = sorted_index(names[:2], ["0.png", "1.png"], [0, 1])
    with pytest.raises(ConfigError, match="/data/test: two classes are named 'crane', and can be neither matched"):
        test.with_classes(names, "/data/test")
    doubled = sorted_index(("bee", "bee"), ["0.png", "1.png"], [0, 1])
    with pytest.raises(ConfigError, match="/data/test: two classes are named 'bee', and can be neither matched"):
        doubled.with_classes(("bee", "crane"), "/data/test")
    same = sorted_index(names, ["0.png", "1.png"], [2, 1])
    assert same.with_classes(names, "/data/test") is same

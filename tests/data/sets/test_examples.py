"""Sets are told apart by what they hold, and classes of one name by their numbers."""

import dataclasses

import numpy as np
import pytest

from vit_dist.config import ConfigError
from vit_dist.data.sets import examples
from vit_dist.data.sets.examples import ArraySource, distinct_names, fingerprint
from vit_dist.data.sets.index import in_order


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
def test_other_pixels_are_another_set(change: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 2, 2, 3), np.uint8)
    other = images.copy()
    other[change] ^= 1
    one, two = (ArraySource(pixels, np.zeros(80, np.int32), ("a",)) for pixels in (images, other))
    assert fingerprint(one) != fingerprint(two)
    again = dataclasses.replace(one, images=images.copy())
    for run in (1, 100, 1 << 24):  # a digest does not depend on how it is read
        monkeypatch.setattr(examples, "_DIGEST_RUN", run)
        assert fingerprint(again) == fingerprint(one)


def test_of_many_pixels_some_are_digested(monkeypatch: pytest.MonkeyPatch) -> None:
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
    test = in_order(names[:2], ["0.png", "1.png"], [0, 1])
    with pytest.raises(ConfigError, match="/data/test: two classes are named 'crane', and can be neither matched"):
        test.with_classes(names, "/data/test")
    doubled = in_order(("bee", "bee"), ["0.png", "1.png"], [0, 1])
    with pytest.raises(ConfigError, match="/data/test: two classes are named 'bee', and can be neither matched"):
        doubled.with_classes(("bee", "crane"), "/data/test")
    same = in_order(names, ["0.png", "1.png"], [2, 1])
    assert same.with_classes(names, "/data/test") is same

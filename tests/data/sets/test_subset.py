"""Some classes, or a fraction of each: which examples stay, and that they never change."""

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import pytest

from vit_dist.config import ConfigError, Data
from vit_dist.data.sets.examples import ArraySource, FileSource, Source, fingerprint
from vit_dist.data.sets.index import Names
from vit_dist.data.sets.sources import open_source
from vit_dist.data.sets.subset import subset

CLASSES = ("ant", "bee", "cat", "dog")
COUNTS = (100, 30, 1, 7)


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Images whose bytes are their number."""

    def read(self, index: int) -> bytes:
        return str(index).encode()


def _arrays() -> ArraySource:
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4, dtype=np.int32), COUNTS))
    images = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    return ArraySource(images, labels, CLASSES)


def _files() -> FileSource:
    labels = np.repeat(np.arange(4, dtype=np.int32), COUNTS)
    names = Names.of(f"{CLASSES[label]}/{number}.png" for number, label in enumerate(labels))
    return FileSource("/data", names, labels, CLASSES, Numbered(), "small")


def _contents(source: Source) -> list[int]:
    """Returns each example's number in `_arrays` or `_files`."""
    if isinstance(source, ArraySource):
        return source.images.ravel().tolist()
    numbers = [int(source.read(index)) for index in range(len(source))]
    assert [source.names[i].partition("/")[2] for i in range(len(source))] == [f"{number}.png" for number in numbers]
    return numbers


BOTH = pytest.mark.parametrize("source", [_arrays(), _files()], ids=["arrays", "files"])


@BOTH
def test_without_classes_and_fraction_the_source_itself_is_returned(source: Source) -> None:
    assert subset(source) is source
    found = dataclasses.replace(source, split="validation")
    assert subset(found, ("dog",), 0.5).split == "validation"


@BOTH
def test_classes_stay_in_order_and_are_numbered_in_the_order_given(source: Source) -> None:
    some = subset(source, ("dog", "ant"))
    numbers = np.flatnonzero((source.labels == 3) | (source.labels == 0))
    assert some.class_names == ("dog", "ant") and some.labels.dtype == np.int32
    assert _contents(some) == numbers.tolist()
    assert some.labels.tolist() == [{3: 0, 0: 1}[label] for label in source.labels[numbers].tolist()]


@BOTH
@pytest.mark.parametrize(("fraction", "counts"), [(0.5, (50, 15, 1, 4)), (0.07, (7, 3, 1, 1)), (1e-9, (1, 1, 1, 1))])
def test_a_fraction_is_of_each_class_rounded_up(source: Source, fraction: float, counts: tuple[int, ...]) -> None:
    some = subset(source, fraction=fraction)
    assert tuple(np.bincount(some.labels)) == counts and some.class_names == CLASSES
    numbers = _contents(some)
    assert numbers == sorted(set(numbers)) and np.array_equal(some.labels, source.labels[numbers])


@BOTH
def test_a_smaller_fraction_lies_within_a_larger(source: Source) -> None:
    shares = [set(_contents(subset(source, fraction=share))) for share in (0.01, 0.1, 0.2, 0.55, 0.9, 1.0)]
    assert all(smaller < larger for smaller, larger in zip(shares, shares[1:]))
    assert shares[-1] == set(range(138))


def test_a_fraction_keeps_the_same_examples_for_ever() -> None:
    assert _contents(subset(_files(), fraction=0.07)) == [7, 8, 9, 52, 56, 78, 98, 100, 125, 126, 130, 134]


@BOTH
def test_a_class_keeps_the_same_examples_whichever_others_there_are(source: Source) -> None:
    together, alone = subset(source, fraction=0.2), subset(source, ("bee",), 0.2)
    assert _contents(alone) == np.array(_contents(together))[together.labels == 1].tolist()


def test_a_fraction_is_drawn_from_all_of_a_class_and_independently_for_each() -> None:
    labels = np.repeat(np.arange(2, dtype=np.int32), 10_000)
    source = ArraySource(np.zeros((20_000, 1, 1, 1), np.uint8), labels, ("one", "other"))
    source = dataclasses.replace(source, images=np.arange(20_000, dtype=np.int32).reshape(-1, 1, 1, 1))
    kept = np.array(_contents(subset(source, fraction=0.1)))
    first, second = kept[:1000], kept[1000:] - 10_000
    for ids in (first, second):
        counts = np.bincount(ids // 1000, minlength=10)
        assert 60 < counts.min() and counts.max() < 140  # 100 expected, deviation 9
    assert 60 < len(set(first) & set(second)) < 140


def test_unknown_and_doubled_classes_are_named() -> None:
    for classes, message in (
        (("ant", "dgo"), r"data.classes: 'dgo' is not among the data's 4 classes \(did you mean dog\?\)"),
        (("ant", "dog", "ant"), "data.classes: 'ant' is listed twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            subset(_files(), classes)
    source = _files()
    with pytest.raises(ConfigError, match="data.classes: the split has no examples of bee"):
        subset(dataclasses.replace(source, labels=np.zeros_like(source.labels)), ("bee",))


def test_classes_that_share_a_name_cannot_be_chosen_by_it() -> None:
    source = dataclasses.replace(_files(), class_names=("crane", "bee", "crane", "dog"))
    with pytest.raises(ConfigError, match="two classes are named 'crane'.*rename one"):
        subset(source, ("bee", "crane"))
    assert len(subset(source, fraction=0.5)) == 70


def test_an_example_without_a_valid_label_is_left_for_the_check_of_labels() -> None:
    source = _files()
    labels = source.labels.copy()
    labels[[5, 40]] = -1, 9
    some = subset(dataclasses.replace(source, labels=labels), fraction=0.5)
    assert {5, 40} < set(_contents(some)) and tuple(np.bincount(some.labels[some.labels > 0]))[1:4] == (15, 1, 4)
    assert not {5, 40} & set(_contents(subset(dataclasses.replace(source, labels=labels), CLASSES)))


def test_a_subset_of_files_can_be_pickled_and_has_its_own_fingerprint() -> None:
    some = subset(_files(), ("bee", "dog"), 0.5)
    copy = pickle.loads(pickle.dumps(some))
    assert _contents(copy) == _contents(some) and fingerprint(copy) == fingerprint(some)
    assert some.name(0) == f"/data/bee/{_contents(some)[0]}.png"
    others = [_files(), subset(_files(), ("dog", "bee"), 0.5), subset(_files(), ("bee", "dog"), 0.6)]
    assert len({fingerprint(source) for source in (some, *others)}) == 4


def test_the_config_keeps_classes_of_every_split_and_a_fraction_of_train(image_set: Path) -> None:
    data = Data(source="folder", path=str(image_set), classes=("dog",), fraction=0.3)
    train, test = open_source(data, "train"), open_source(data, "test")
    assert train.class_names == test.class_names == ("dog",)
    assert train.labels.tolist() == [0] * 3 and test.labels.tolist() == [0] * 4  # 8 and 4 dogs
    for index in range(3):
        assert isinstance(train, FileSource) and train.read(index) == Path(train.name(index)).read_bytes()
    pixels = open_source(dataclasses.replace(data, in_memory=True), "train")
    assert isinstance(pixels, ArraySource) and pixels.images.shape == (3, 12, 10, 3)
    digits = open_source(Data(classes=("7", "1"), fraction=0.1), "train")
    assert isinstance(digits, ArraySource) and digits.class_names == ("7", "1")
    assert np.bincount(digits.labels).tolist() == [16, 16]  # of 153 and 154

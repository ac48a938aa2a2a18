"""Mixtures: sets are joined by class name and seen by weight, and a set that cannot be joined is named."""

import dataclasses
import logging
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from containers import one_line_error

from vit_dist.config import ConfigError, Data, MixtureSource
from vit_dist.data.pictures.images import decode
from vit_dist.data.sets.examples import ArraySource, FileSource, Source, fingerprint
from vit_dist.data.sets.mixture import open_mixture
from vit_dist.data.sets.sources import open_source
from vit_dist.data.stream.order import BLOCK, Order, block_slots


@pytest.fixture
def other_set(tmp_path: Path, encode: Callable[..., bytes]) -> Path:
    """A folder of `train` (ant 2, dog 3) and `test` (ant 1), of the same image size as `image_set`."""
    root = tmp_path / "other"
    for split, counts in (("train", {"ant": 2, "dog": 3}), ("test", {"ant": 1})):
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                (root / split / name / f"{number}.png").write_bytes(encode(100 + len(name) + number))
    return root


def _data(*paths: Path, weights: tuple[float | None, ...] = (), **keys: object) -> Data:
    sources = tuple(
        MixtureSource("folder", str(path), weight)
        for path, weight in zip(paths, weights or [None] * len(paths), strict=True)
    )
    return Data(**{"source": "folder", "path": str(paths[0]), "mixture": sources, **keys})  # type: ignore[arg-type]


def _files(data: Data, split: str = "train") -> FileSource:
    source = open_source(data, split)
    assert isinstance(source, FileSource)
    return source


def _fails(message: str, data: Data, split: str = "train") -> None:
    with one_line_error(message):
        open_source(data, split)


def test_sources_are_joined_end_to_end_with_the_classes_of_all(image_set: Path, other_set: Path) -> None:
    source = _files(_data(image_set, other_set))
    assert source.class_names == ("ant", "cat", "dog") and source.labels.dtype == np.int32
    assert source.labels.tolist() == [1] * 5 + [2] * 8 + [0] * 2 + [2] * 3
    assert source.mixture == ()
    assert source.name(0) == f"{image_set}/train/cat/0.png" and source.name(15) == f"{other_set}/train/dog/0.png"
    for index in range(len(source)):
        assert source.read(index) == Path(source.name(index)).read_bytes()
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(index) for index in range(18)] == [source.read(index) for index in range(18)]


def test_classes_that_all_sources_share_keep_their_order() -> None:
    def open_set(data: Data, split: str) -> Source:
        return ArraySource(np.zeros((3, 1, 1, 1), np.uint8), np.arange(3, dtype=np.int32), ("z", "a", "m"))

    source = open_mixture(_data(Path("a"), Path("b")), "train", open_set)
    assert source.class_names == ("z", "a", "m") and source.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_names_are_relative_to_the_folder_that_holds_all_sources(image_set: Path, other_set: Path) -> None:
    source = _files(_data(image_set, other_set))
    assert source.where == str(image_set.parent) and source.names[0] == "set/train/cat/0.png"
    same = _files(_data(image_set, image_set))
    assert same.where == f"{image_set}/train" and same.names[0] == same.names[13] == "cat/0.png"
    moved = image_set.parent / "moved"
    moved.mkdir()
    before = fingerprint(source)
    paths = [path.rename(moved / path.name) for path in (image_set, other_set)]
    assert fingerprint(_files(_data(*paths))) == before
    source = dataclasses.replace(source, where="gs://bucket/train")

    def open_set(data: Data, split: str) -> Source:
        return source if data.path == "a" else dataclasses.replace(source, where="/data/train")

    far = open_mixture(_data(Path("a"), Path("b")), "train", open_set)
    assert far.name(0) == "gs://bucket/train/set/train/cat/0.png"
    assert far.name(18) == "/data/train/set/train/cat/0.png"


def test_weights_travel_with_the_source_into_the_order(image_set: Path, other_set: Path) -> None:
    source = _files(_data(image_set, other_set, weights=(1.0, 3.0)))
    assert source.mixture == ((13, 1.0), (5, 3.0)) and source.split == "train"
    sizes, weights = tuple(size for size, _ in source.mixture), tuple(weight for _, weight in source.mixture)
    ids = Order(0, sizes, weights).ids(np.arange(BLOCK))
    assert [(ids < 13).sum(), (ids >= 13).sum()] == list(block_slots((1.0, 3.0))) == [4096, 12288]


def test_weights_are_set_for_all_sources_or_none_and_above_0(image_set: Path, other_set: Path) -> None:
    _fails(r"data.mixture\[1\].weight: not set, but others", _data(image_set, other_set, weights=(1.0, None)))
    _fails(
        r"data.mixture\[0\].weight: must be above 0 and finite, found 0",
        _data(image_set, other_set, weights=(0.0, 1.0)),
    )
    for weight in (math.nan, math.inf):
        _fails(r"weight: must be above 0 and finite", _data(image_set, other_set, weights=(weight, 1.0)))


def test_evaluation_splits_are_labelled_as_training_is(
    image_set: Path, other_set: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        test = _files(_data(image_set, other_set), "test")
    assert test.class_names == ("ant", "cat", "dog") and test.labels.tolist() == [1] * 3 + [2] * 4
    assert "no images of 1 classes of data.mixture in the evaluation split, such as 'ant'" in caplog.text
    assert test.name(0) == f"{image_set}/test/cat/0.png" and test.mixture == () and test.split == "test"
    alone = _data(other_set, path=str(image_set))  # cats are evaluated on, but not trained on
    _fails("data.path: class 'cat' is none of the 2 of data.mixture; .*data.source, data.path", alone, "test")
    assert len(_files(dataclasses.replace(alone, classes=("dog",)), "test")) == 4
    _fails("data.path: class '0' is none of the 3", _data(image_set, other_set, source="digits", path=None), "test")


def test_chosen_classes_are_taken_from_each_source_that_has_them(image_set: Path, other_set: Path) -> None:
    data = _data(image_set, other_set, weights=(1.0, 1.0), classes=("dog", "ant"))
    train, test = _files(data), _files(data, "test")
    assert train.class_names == test.class_names == ("dog", "ant")
    assert train.labels.tolist() == [0] * 8 + [1] * 2 + [0] * 3 and train.mixture == ((8, 1.0), (5, 1.0))
    assert test.labels.tolist() == [0] * 4
    chosen = dataclasses.replace(data, classes=("ant",))
    _fails(r"data.mixture\[0\]: has none of data.classes, such as 'ant'", chosen)
    _fails("data.path: has none of data.classes, such as 'ant'", chosen, "test")
    _fails("data.classes: 'dgo' is not among the data's 3 classes .*dog", dataclasses.replace(data, classes=("dgo",)))


def test_a_fraction_is_of_each_class_of_each_source(image_set: Path, other_set: Path) -> None:
    data = _data(image_set, other_set, weights=(1.0, 2.0), fraction=0.5)
    train = _files(data)
    assert train.labels.tolist() == [1] * 3 + [2] * 4 + [0] + [2] * 2 and train.mixture == ((7, 1.0), (3, 2.0))
    for index in range(len(train)):
        assert train.read(index) == Path(train.name(index)).read_bytes()
    assert len(_files(data, "test")) == 7
    alone = _files(Data(source="folder", path=str(image_set), fraction=0.5))
    assert [train.read(index) for index in range(7)] == [alone.read(index) for index in range(7)]


def test_a_mixture_of_pixels_is_pixels(image_set: Path, other_set: Path) -> None:
    files = _files(_data(image_set, other_set))
    pixels = open_source(_data(image_set, other_set, weights=(1.0, 3.0), in_memory=True), "train")
    assert isinstance(pixels, ArraySource) and pixels.images.shape == (18, 12, 10, 3)
    assert pixels.mixture == ((13, 1.0), (5, 3.0)) and np.array_equal(pixels.labels, files.labels)
    assert all(np.array_equal(pixels.images[i], decode(files.read(i), 3)) for i in range(18))
    digits = Data(mixture=(MixtureSource("digits", None, 2.0), MixtureSource("digits", None, 1.0)))
    twice, once = open_source(digits, "train"), open_source(Data(), "train")
    assert isinstance(twice, ArraySource) and isinstance(once, ArraySource)
    assert twice.mixture == ((1437, 2.0), (1437, 1.0)) and twice.class_names == once.class_names
    assert np.array_equal(twice.images, np.concatenate([once.images, once.images]))
    assert len(open_source(digits, "test")) == 360


def test_what_does_not_mix_is_named(image_set: Path, other_set: Path) -> None:
    kinds = Data(mixture=(MixtureSource("digits"), MixtureSource("folder", str(image_set))))
    _fails("data.mixture: source 1 has image files, source 0 pixels; .*vit-dist prepare", kinds)
    _fails(r"data.mixture\[1\]: data.path: no such file or folder: .*nowhere", _data(image_set, Path("/nowhere")))
    _fails(
        r"data.mixture\[0\]: data.source: 'foldr' is none of", Data(mixture=(MixtureSource("foldr", str(image_set)),))
    )
    _fails(
        "data.mixture: takes .*data.memory_limit_gb", Data(mixture=(MixtureSource("digits"),) * 2, memory_limit_gb=1e-4)
    )

    def open_set(data: Data, split: str) -> Source:
        size, count = (int(number) for number in str(data.path).split())
        return ArraySource(np.zeros((count, size, size, 1), np.uint8), np.zeros(count, np.int32), ("a",))

    with pytest.raises(ConfigError, match=r"data.mixture\[1\]: images of 3x3x1, but those of source 0 are 2x2x1"):
        open_mixture(_data(Path("2 4"), Path("3 4")), "train", open_set)
    with pytest.raises(ConfigError, match=r"data.mixture\[1\]: holds no examples"):
        open_mixture(_data(Path("2 4"), Path("2 0")), "train", open_set)
    assert len(open_mixture(_data(Path("2 4"), Path("2 3")), "train", open_set)) == 7

"""Small sets in memory: the digits, and the class names of sets that come in MNIST's files and are not MNIST."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from containers import write_idx
from system import ROOT

from vit_dist import recipes
from vit_dist.config import ConfigError, Data
from vit_dist.data.sets.formats.idx import read_digits
from vit_dist.data.sets.sources import open_source


def _write(folder: Path, prefix: str, labels: list[int]) -> None:
    write_idx(folder, prefix, np.zeros((len(labels), 3, 2), np.uint8), np.array(labels, np.uint8))


def _class_names(folder: Path, split: str = "train") -> tuple[str, ...]:
    return open_source(Data(source="idx", path=str(folder)), split).class_names


def test_sets_of_no_known_name_have_numbers_for_classes(tmp_path: Path) -> None:
    _write(tmp_path / "emnist-letters", "train", [1, 26, 4])
    _write(tmp_path / "emnist-letters", "t10k", [3, 1])
    for split in ("train", "test"):  # the test split lacks the last classes
        assert _class_names(tmp_path / "emnist-letters", split) == tuple(map(str, range(27)))
    _write(tmp_path / "kmnist", "t10k", [3, 1])
    assert _class_names(tmp_path / "kmnist", "test") == ("0", "1", "2", "3")


def test_a_set_that_is_named_has_its_own_names_whatever_the_folder_is_called(tmp_path: Path) -> None:
    _write(tmp_path / "fashion", "train", [1, 4])
    assert _class_names(tmp_path / "fashion") == tuple("01234")
    data = Data(source="idx", path=str(tmp_path / "fashion"), name="fashion_mnist")
    assert open_source(data, "train").class_names[8:] == ("bag", "ankle boot")
    _write(tmp_path / "fashion", "train", [1, 11])
    with pytest.raises(ConfigError, match=r"fashion: labels of 0..11, but 10 class names"):
        open_source(data, "train")


def test_the_lessons_recipe_is_of_fashion_mnist_with_its_class_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # its path is relative
    data = recipes.load(ROOT / "configs" / "d2l_fashion_mnist.py").data
    assert (data.source, data.name, data.path) == ("idx", "fashion_mnist", "datasets/fashion_mnist")
    missing = "data.path: no such file or folder: datasets/fashion_mnist; set data.download=true to fetch fashion_mnist"
    with pytest.raises(ConfigError, match=missing):
        open_source(data, "train")
    _write(tmp_path / "datasets/fashion_mnist", "train", list(range(10)))
    assert open_source(data, "train").class_names == (
        "t-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip


def test_a_text_file_names_the_classes(tmp_path: Path) -> None:
    _write(tmp_path / "mnist", "train", [1, 0, 2])
    (tmp_path / "mnist/classes.txt").write_text("o\nki\nsu\n")
    assert _class_names(tmp_path / "mnist") == ("o", "ki", "su")
    (tmp_path / "mnist/classes.txt").write_text("o\nki\n")
    with pytest.raises(ConfigError, match="mnist: labels of 0..2, but 2 class names; name every class"):
        _class_names(tmp_path / "mnist")


def test_digits_are_those_that_scikit_learn_loads() -> None:
    from sklearn.datasets import load_digits  # here: it takes a second

    images, labels = load_digits(return_X_y=True)
    every_fifth = np.arange(len(labels)) % 5 == 0
    for split, chosen in (("test", every_fifth), ("train", ~every_fifth)):
        found, found_labels = read_digits(split)
        count = {"test": 360, "train": 1437}[split]
        assert (found.shape, found.dtype, found_labels.dtype) == ((count, 8, 8, 1), np.uint8, np.int32)
        np.testing.assert_array_equal(found_labels, labels[chosen])
        np.testing.assert_allclose(found.reshape(count, 64) * (16 / 255), images[chosen], atol=16 / 255 / 2)


def test_digits_are_read_without_importing_scikit_learn() -> None:
    code = (
        "import sys; from vit_dist.data.sets.formats.idx import read_digits; read_digits('test'); print(*sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "numpy" in shown and not {"sklearn", "scipy"} & set(shown)

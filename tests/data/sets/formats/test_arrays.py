"""Arrays: Keras's and MedMNIST's layouts and plain folders give the same pixels and labels, in the array's order."""

import functools
import pickle
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from containers import assert_refused, open_arrays

_open = functools.partial(open_arrays, "npz")
_fails = functools.partial(assert_refused, "npz")

Split = tuple[np.ndarray, np.ndarray]


@pytest.fixture
def sets() -> dict[str, Split]:
    rng = np.random.default_rng(0)
    shapes = {"train": (9, 5, 4, 3), "test": (4, 5, 4, 3)}
    images = {split: rng.integers(0, 256, shape, np.uint8) for split, shape in shapes.items()}
    labels = {"train": np.array([3, 0, 1, 2, 0, 0, 1, 2, 3], np.uint8), "test": np.array([2, 0, 1, 0], np.uint8)}
    return {split: (images[split], labels[split]) for split in shapes}


def _keras(folder: Path, sets: dict[str, Split]) -> Path:
    (x_train, y_train), (x_test, y_test) = sets["train"], sets["test"]
    np.savez_compressed(folder / "set.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return folder / "set.npz"


def _medmnist(folder: Path, sets: dict[str, Split]) -> Path:
    train, test = sets["train"], sets["test"]
    keys = {"train_images": train[0], "val_images": test[0], "test_images": test[0]}
    np.savez(
        folder / "set.npz",
        **keys,
        train_labels=train[1][:, None],
        val_labels=test[1][:, None],
        test_labels=test[1][:, None],
    )
    return folder / "set.npz"


def _files(folder: Path, sets: dict[str, Split]) -> Path:
    np.savez(folder / "train.npz", images=sets["train"][0], labels=sets["train"][1])
    np.savez(folder / "test.npz", x=sets["test"][0], y=sets["test"][1])
    return folder


def _npy(folder: Path, sets: dict[str, Split]) -> Path:
    for split, names in (("train", ("{}_images", "{}_labels")), ("test", ("x_{}", "y_{}"))):
        for name, array in zip(names, sets[split]):
            np.save(folder / f"{name.format(split)}.npy", array)
    return folder


@pytest.mark.parametrize("layout", [_keras, _medmnist, _files, _npy])
def test_every_layout_gives_the_arrays_in_their_order(layout: Any, tmp_path: Path, sets: dict[str, Split]) -> None:
    path = layout(tmp_path, sets)
    for split, stored in (("train", "train"), ("test", "test"), ("val", "test")):
        source = _open(path, split)
        assert source.images.dtype == np.uint8 and np.array_equal(source.images, sets[stored][0])
        assert source.labels.dtype == np.int32 and source.labels.tolist() == sets[stored][1].tolist()
        assert source.class_names == ("0", "1", "2", "3")  # the train split's, though the test split lacks the last
        copy = pickle.loads(pickle.dumps(source))
        assert np.array_equal(copy.images, source.images)


def test_npy_files_are_mapped_not_read(tmp_path: Path, sets: dict[str, Split]) -> None:
    huge = np.lib.format.open_memmap(
        tmp_path / "train_images.npy", "w+", np.uint8, (1 << 12, 256, 256)
    )  # 4 GiB, sparse
    huge[-1] = 7
    np.save(tmp_path / "train_labels.npy", np.zeros(1 << 12, np.int64))
    source = _open(tmp_path, memory_limit_gb=0.001)
    assert source.images.shape == (1 << 12, 256, 256, 1) and isinstance(source.images, np.memmap)
    assert source.images[-1].min() == 7


def test_an_npz_beyond_the_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "train.npz", images=np.zeros((64, 128, 128), np.uint8), labels=np.zeros(64, np.int8))
    _fails(
        "'images' takes 0.000977 GiB, more than data.memory_limit_gb=0.000488281; raise it",
        tmp_path,
        memory_limit_gb=2**-11,
    )
    assert len(_open(tmp_path, memory_limit_gb=0.001)) == 64


def test_class_names_are_those_of_the_text_file_then_of_the_array(tmp_path: Path, sets: dict[str, Split]) -> None:
    images, labels = sets["train"]
    np.savez(tmp_path / "train.npz", images=images, labels=labels, class_names=np.array(["cat", "dog", "owl", "pig"]))
    assert _open(tmp_path).class_names == ("cat", "dog", "owl", "pig")
    np.savez(
        tmp_path / "train.npz", images=images, labels=labels, class_names=[b"cat", b"dog", b"owl", "Käfer".encode()]
    )
    assert _open(tmp_path).class_names == ("cat", "dog", "owl", "Käfer")
    (tmp_path / "classes.txt").write_text("Katze\nHund\nEule\nSchwein\nWühlmaus\n", encoding="utf-8")
    assert _open(tmp_path).class_names == ("Katze", "Hund", "Eule", "Schwein", "Wühlmaus")
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    _fails("labels of 0..3, but 3 class names", tmp_path)


def test_gray_images_may_lack_the_last_axis(tmp_path: Path) -> None:
    np.savez(tmp_path / "train.npz", images=np.arange(24, dtype=np.uint8).reshape(2, 3, 4), labels=[0, 1])
    assert _open(tmp_path).images.shape == (2, 3, 4, 1) and _open(tmp_path).images[1, 2, 3, 0] == 23


def test_pixels_that_do_not_fit_are_refused_with_what_to_do(tmp_path: Path) -> None:
    for images, message in (
        (np.zeros((2, 4, 4, 3), np.float32), "'images' is of float32, expected uint8, 0 to 255; scale"),
        (np.zeros((2, 4, 4, 3), np.uint16), "'images' is of uint16, expected uint8"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"\[2, 3, 8, 8\], channels first; save its .transpose\(0, 2, 3, 1\)"),
        (np.zeros((2, 16), np.uint8), r"\[2, 16\], expected \[N, H, W\]"),
        (np.zeros((2, 0, 4), np.uint8), r"\[2, 0, 4\], expected \[N, H, W\]"),
    ):
        np.savez(tmp_path / "train.npz", images=images, labels=[0, 1])
        _fails(message, tmp_path)


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for labels, message in (
        ([0, 1, 1], "3 'labels' for 2 'images'"),
        ([0, -1], "holds the label -1, expected 0 or more"),
        ([0, 2**32], "holds the label 4294967296, which is not a class number"),
        ([0.0, 1.0], r"float64 \[2\], expected one whole number an image"),
        (np.eye(2, dtype=np.int64), r"int64 \[2, 2\], expected one whole number an image"),
    ):
        np.savez(tmp_path / "train.npz", images=np.zeros((2, 4, 4), np.uint8), labels=labels)
        _fails(message, tmp_path)


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    labels = np.array([{"a": 1}, None], object)
    np.savez(tmp_path / "train.npz", images=np.zeros((2, 4, 4), np.uint8), labels=labels)
    _fails("'labels': cannot be read .*allow_pickle=False", tmp_path)


def test_damaged_files_are_named(tmp_path: Path, sets: dict[str, Split]) -> None:
    file = _keras(tmp_path, sets)
    original = file.read_bytes()
    for damaged in (b"", b"text", original[: len(original) // 2]):
        file.write_bytes(damaged)
        _fails("set.npz: cannot be read", file)
    file.write_bytes(original[:80] + bytes(40) + original[120:])
    _fails("set.npz: 'x_train': cannot be read", file)
    _npy(tmp_path, sets)
    (tmp_path / "train_images.npy").write_bytes((tmp_path / "train_images.npy").read_bytes()[:-1])
    _fails("train_images.npy: cannot be read", tmp_path)


def test_missing_arrays_are_named_with_those_found(tmp_path: Path, sets: dict[str, Split]) -> None:
    _fails(
        "no split 'extra' in .*set.npz; expected the arrays x_extra.*found: x_train, y_train",
        _keras(tmp_path, sets),
        "extra",
    )
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy/train_images.npy", sets["train"][0])
    _fails("expected train.npz of images.*found: train_images.npy", tmp_path / "npy")
    np.savez(tmp_path / "npy/train.npz", pixels=sets["train"][0], labels=sets["train"][1])
    _fails("train.npz; expected the arrays images and labels, found: pixels, labels", tmp_path / "npy")


def test_arrays_are_read_from_remote_storage(tmp_path: Path, sets: dict[str, Split]) -> None:
    root = f"/{uuid.uuid4()}"
    (tmp_path / "npy").mkdir()
    fsspec.filesystem("memory").put(f"{_npy(tmp_path / 'npy', sets)}/", root, recursive=True)
    fsspec.filesystem("memory").put(str(_keras(tmp_path, sets)), f"{root}/set.npz")
    for path in (f"memory:/{root}", f"memory:/{root}/set.npz"):
        assert np.array_equal(_open(path, "test").images, sets["test"][0])
    _fails("train_images.npy takes .* more than data.memory_limit_gb", f"memory:/{root}", memory_limit_gb=1e-7)

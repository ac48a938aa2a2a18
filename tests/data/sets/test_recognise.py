"""A set's source is recognised by its files, and each split is prepared once, under its own name."""

import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from containers import add_file, one_line_error

from vit_dist.config import ConfigError, Data
from vit_dist.data.prepare.convert import prepare
from vit_dist.data.sets.examples import ArraySource
from vit_dist.data.sets.recognise import open_splits, recognise, sample

Tar = Callable[..., Path]


@pytest.fixture
def tar(tmp_path: Path) -> Tar:
    """`tar(file, *members)`: a tar of files that hold a zero each, below the test's folder."""

    def tar(file: str, *members: str) -> Path:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w:gz" if file.endswith("gz") else "w") as stream:
            for member in members:
                add_file(stream, member, b"0")
        return path

    return tar


def _touch(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def _splits(source: Path, kind: str | None = None) -> list[str]:
    return list(open_splits(str(source), kind, (), Data()))


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (["train/cat/1.png"], "folder"),
        (["val/cat/1.png", ".DS_Store", "README.md"], "folder"),
        (["train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte"], "idx"),
        (["x.npz"], "npz"),
        (["train_images.npy", "train_labels.npy"], "npz"),
        (["data/train-00000-of-00001.parquet", "README.md"], "parquet"),
        (["train/0000.parquet"], "parquet"),
        (["dataset_info.json", "cifar10-train.array_record-00000-of-00001"], "tfds"),
        (["manifest.json", "train-00000-of-00001.array_record"], "array_record"),
        ([".vit_dist_parts/plan.json"], "array_record"),
        (["ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"], "imagenet_tar"),
    ],
)
def test_the_source_is_recognised_by_file_names(tmp_path: Path, files: list[str], kind: str) -> None:
    assert recognise(_touch(tmp_path, *files)) == kind


@pytest.mark.parametrize(
    ("members", "kind"),
    [
        (["train/cat/1.png"], "tar"),
        (["LICENSE", "images/train/cat/1.JPEG"], "tar"),
        (["n01440764.tar", "n01443537.tar"], "imagenet_tar"),
        (["1.jpg", "1.cls", "2.jpg", "2.cls"], "webdataset"),
        (["1.jpg", "1.json"], "webdataset"),
    ],
)
def test_a_tar_is_recognised_by_its_first_members(tmp_path: Path, tar: Tar, members: list[str], kind: str) -> None:
    for file in ("train-0000.tar", "below/train/0000.tar", "gz/train.tar.gz"):
        tar(file, *members)
    assert recognise(tmp_path) == recognise(tmp_path / "below") == recognise(tmp_path / "gz") == kind
    assert recognise(tmp_path / "gz" / "train.tar.gz") == kind


def test_an_unknown_or_ambiguous_set_is_an_error_of_one_line(tmp_path: Path, tar: Tar) -> None:
    tar("text.tar", "a.txt", "b.txt")
    tar("mixed/train.tar", "train/cat/1.png")
    _touch(tmp_path, "mixed/train.npz", "deep/default/train/0000.parquet", "notes.txt")
    (tmp_path / "no.tar").write_bytes(b"no tar at all" * 100)
    for name, message in (
        ("text.tar", "no data set that is known by its files"),
        ("notes.txt", "no data set that is known by its files"),
        ("mixed", "may be npz or tar; say which with --source, one of digits, "),
        ("deep", "known by its files; name the folder that holds its splits, or say which with --source"),
        ("no.tar", "cannot be read"),
        ("nowhere", "no such file or folder"),
    ):
        with one_line_error(f"{re.escape(name)}: .*{message}"):
            recognise(tmp_path / name)
    assert recognise(tmp_path / "deep" / "default") == "parquet"


def test_one_file_of_a_set_is_refused_and_its_folder_asked_for(tmp_path: Path, tar: Tar, image_set: Path) -> None:
    shards = tar("shards/train-0000.tar", "1.jpg", "1.cls")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train.tar.gz", "w:gz") as stream:
        stream.add(image_set / "train", ".")
    np.savez(tmp_path / "train.npz", images=np.zeros((4, 2, 2), np.uint8), labels=np.arange(4))
    idx = _touch(tmp_path / "mnist", "train-images-idx3-ubyte.gz") / "train-images-idx3-ubyte.gz"
    imagenet = tar("imagenet/ILSVRC2012_img_train.tar", "n01440764.tar")
    for file in (shards, tmp_path / "tars" / "train.tar.gz", tmp_path / "train.npz", idx, imagenet):
        with one_line_error(f"{file.name}.* name the folder that holds it"):
            _splits(file)
    with pytest.raises(ConfigError, match="is one file of a set .--source=idx.; name the folder"):
        _splits(idx, "idx")
    assert _splits(tmp_path / "tars") == ["train"]


def test_a_split_keeps_the_name_that_the_set_uses(tmp_path: Path, tar: Tar, image_set: Path) -> None:
    assert _splits(image_set) == ["train", "test"]
    shutil.move(image_set / "test", image_set / "validation")
    assert _splits(image_set) == ["train", "val"]
    for name in ("train", "val"):
        tar(f"shards/set-{name}-0000.tar", *(f"{i}.{suffix}" for i in range(3) for suffix in ("jpg", "cls")))
    assert _splits(tmp_path / "shards") == ["train", "val"]
    arrays = {"images": np.zeros((4, 2, 2), np.uint8), "labels": np.arange(4)}
    np.savez(
        tmp_path / "all.npz", **{f"{split}_{key}": array for split in ("train", "val") for key, array in arrays.items()}
    )
    assert _splits(tmp_path / "all.npz") == ["train", "val"]
    prepare(str(tmp_path / "all.npz"), str(tmp_path / "records"))
    assert _splits(tmp_path / "records") == ["train", "val"]


def test_a_sample_covers_both_ends_of_a_split_and_the_shape() -> None:
    def digest(images: np.ndarray) -> str:
        return sample(ArraySource(images, np.zeros(len(images), np.int32), ("a",)))

    images = np.zeros((50, 4, 6, 1), np.uint8)
    first, last = images.copy(), images.copy()
    first[0, 0, 0], last[-1, -1, -1] = 1, 1
    variants = (images, first, last, images.reshape(50, 6, 4, 1), images[:1])
    assert len({digest(variant) for variant in variants}) == 5
    assert digest(images) == digest(images.copy())

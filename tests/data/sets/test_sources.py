"""Sources: the same examples, in the same order, whatever the container; and an error for everything that is wrong."""

import ast
import dataclasses
import io
import logging
import os
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from containers import add_file, assert_refused, assert_same, open_arrays, open_files, open_set, write_idx

import vit_dist.data
from vit_dist.config import ConfigError, Data
from vit_dist.data.pictures.images import decode
from vit_dist.data.sets.examples import ArraySource, check_labels, fingerprint
from vit_dist.data.sets.index import Names
from vit_dist.data.sets.sources import open_source


def test_the_data_room_never_imports_jax() -> None:
    for file in Path(vit_dist.data.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if re.match(r"(jax|flax)\b", name)], file


# digits


def test_digits_are_1437_and_360() -> None:
    train, test = open_arrays("digits", None), open_arrays("digits", None, "test")
    assert train.images.shape == (1437, 8, 8, 1) and test.images.shape == (360, 8, 8, 1)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    assert train.images.max() == 255 and train.images.min() == 0
    assert train.class_names == tuple("0123456789") and set(train.labels) == set(range(10))
    assert test.labels[:3].tolist() == [0, 5, 0]  # the set begins 0 1 2 3 4 5 6 7 8 9 0
    assert train.labels[:4].tolist() == [1, 2, 3, 4]


def test_digits_have_no_other_split() -> None:
    assert_refused("digits", "no split 'extra'", None, "extra")
    val = open_set("digits", None, "val")
    assert len(val) == 360 and val.split == "test"


def test_digits_have_no_path(tmp_path: Path) -> None:
    assert_refused("digits", "data.path: .*, but data.source=digits reads no files; leave one out", tmp_path)


# idx


@pytest.fixture
def idx_set(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 20), ("t10k", 7)):
        images, labels = rng.integers(0, 256, (count, 5, 4), np.uint8), rng.integers(0, 10, count, np.uint8)
        write_idx(tmp_path / "mnist", prefix, images, labels, packed=prefix == "train")
    return tmp_path / "mnist"


def test_idx_files_are_read_gzipped_or_not(idx_set: Path) -> None:
    train, test = open_arrays("idx", idx_set), open_arrays("idx", idx_set, "test")
    assert train.images.shape == (20, 5, 4, 1) and test.images.shape == (7, 5, 4, 1)
    rng = np.random.default_rng(0)
    assert np.array_equal(train.images[..., 0], rng.integers(0, 256, (20, 5, 4), np.uint8))
    assert np.array_equal(train.labels, rng.integers(0, 10, 20, np.uint8))


def test_a_missing_idx_file_is_named_with_where_to_get_it(idx_set: Path) -> None:
    (idx_set / "t10k-labels-idx1-ubyte").unlink()
    assert_refused("idx", r"no t10k-labels-idx1-ubyte or .*; give the folder that holds it", idx_set, "test")
    with pytest.raises(ConfigError, match=r"no t10k-labels.*; set data.download=true, or fetch https://.*/t10k-labels"):
        open_source(Data(source="idx", path=str(idx_set), name="mnist"), "test")


def test_damaged_idx_files_are_named(idx_set: Path) -> None:
    images, labels = idx_set / "t10k-images-idx3-ubyte", idx_set / "t10k-labels-idx1-ubyte"
    original = images.read_bytes()
    images.write_bytes(original[:-1])
    assert_refused("idx", r"t10k-images.*do not fit its header, which says \(7, 5, 4\)", idx_set, "test")
    images.write_bytes(original[:9])
    assert_refused("idx", "t10k-images.*do not fit", idx_set, "test")
    images.write_bytes(labels.read_bytes())
    assert_refused("idx", "t10k-images.*begins with 00000801, expected 00000803", idx_set, "test")
    images.write_bytes(b"")
    assert_refused("idx", "t10k-images.*begins with nothing", idx_set, "test")
    images.write_bytes(original)
    labels.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 6]) + bytes(6))
    assert_refused("idx", "6 labels for the 7 images", idx_set, "test")
    packed = idx_set / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:100])
    assert_refused("idx", "train-images-idx3-ubyte.gz: cannot be read", idx_set)


def test_mnist_is_read(shared: Path) -> None:
    test = open_arrays("idx", shared / "mnist", "test")
    assert test.images.shape == (10_000, 28, 28, 1)
    assert test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert np.bincount(test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


# folders and tars


def test_ids_follow_class_then_name(image_set: Path) -> None:
    train, test = open_files("folder", image_set), open_files("folder", image_set, "test")
    assert train.class_names == test.class_names == ("cat", "dog")
    assert train.labels.tolist() == [0] * 5 + [1] * 8 and test.labels.tolist() == [0] * 3 + [1] * 4
    assert tuple(train.names) == (*(f"cat/{i}.png" for i in range(5)), *(f"dog/{i}.png" for i in range(8)))
    assert train.name(5) == f"{image_set}/train/dog/0.png"
    assert train.read(5) == (image_set / "train" / "dog" / "0.png").read_bytes()


def test_a_pipe_among_the_images_does_not_stop_for_ever(image_set: Path) -> None:
    os.mkfifo(image_set / "train/cat/5.png")
    with pytest.raises(OSError, match="it is a pipe"):
        open_files("folder", image_set).read(5)


@pytest.mark.parametrize("inside", ["", "my-pictures"])
@pytest.mark.parametrize(
    ("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tar.bz2", "w:bz2"), (".txz", "w:xz")]
)
def test_a_tar_of_all_splits_is_the_folder(
    image_set: Path, pack: Callable[..., Path], tmp_path: Path, inside: str, suffix: str, mode: str
) -> None:
    file = pack(image_set, tmp_path / f"set{suffix}", inside, mode)
    for split in ("train", "test"):
        assert_same(open_files("tar", file, split), open_files("folder", image_set, split))


@pytest.mark.parametrize("inside", ["", "{split}", "deep/{split}"])
@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_a_folder_of_tars_is_the_folder(
    image_set: Path, pack: Callable[..., Path], tmp_path: Path, inside: str, suffix: str, mode: str
) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    for split in ("train", "test"):
        pack(image_set / split, tars / f"{split}{suffix}", inside.format(split=split), mode)
    for split in ("train", "test"):
        assert_same(open_files("tar", tars, split), open_files("folder", image_set, split))


def test_val_stands_for_test_and_test_for_val(image_set: Path, pack: Callable[..., Path], tmp_path: Path) -> None:
    test = open_files("tar", pack(image_set, tmp_path / "first.tar"), "test")
    assert_same(open_files("folder", image_set, "val"), test)
    (image_set / "test").rename(image_set / "validation")
    renamed = open_files("folder", image_set, "test")
    assert_same(renamed, test)
    whole = open_files("tar", pack(image_set, tmp_path / "set.tar"), "val")
    assert_same(whole, test)
    pack(image_set / "validation", image_set / "val.tar")
    alone = open_files("tar", image_set, "test")
    assert_same(alone, test)
    assert [source.split for source in (test, renamed, whole, alone)] == ["test", "validation", "validation", "val"]


def test_a_source_can_be_pickled(image_set: Path, pack: Callable[..., Path], tmp_path: Path) -> None:
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz")):
        source = open_files("tar", pack(image_set, tmp_path / f"set{suffix}", "", mode))
        data = pickle.dumps(source)
        assert len(data) < 3000  # the path is sent, not the bytes
        assert_same(pickle.loads(data), source)
    source = open_files("folder", image_set)
    assert_same(pickle.loads(pickle.dumps(source)), source)


def test_image_suffixes_are_known_in_any_case_and_other_files_are_counted(
    image_set: Path, pack: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cat = image_set / "train" / "cat"
    (cat / "0.png").rename(cat / "0.JPEG")
    for name in ("notes.txt", "._1.png", ".DS_Store"):
        (cat / name).write_bytes(b"x")
    (cat / "deeper").mkdir()
    (cat / "deeper" / "9.png").write_bytes((cat / "1.png").read_bytes())
    (image_set / "train" / "README").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert len(open_files("folder", image_set)) == 13
    assert len(caplog.records) == 1
    assert "left out 5 entries" in caplog.text and "README" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert len(open_files("tar", pack(image_set, tmp_path / "set.tar"))) == 13
    assert len(caplog.records) == 1 and "left out 5 entries" in caplog.text


def test_what_is_missing_is_named(image_set: Path, pack: Callable[..., Path], tmp_path: Path) -> None:
    assert_refused("foldr", "data.source: 'foldr' is none of .*did you mean folder", image_set)
    for source in ("folder", "tar", "idx"):
        assert_refused(source, f"data.path: not set; the source '{source}' needs", None)
        assert_refused(source, "data.path: no such file or folder: .*/nowhere", tmp_path / "nowhere")
    assert_refused("folder", "no folder 'extra' in .*found: test, train", image_set, "extra")
    assert_refused("tar", "no extra.tar", tmp_path, "extra")
    assert_refused("tar", "set data.source=folder", image_set)
    file = pack(image_set, tmp_path / "train.tar")
    assert_refused("tar", "train.tar: no split 'extra' in it; .*found splits: 'test', 'train'", file, "extra")
    assert_refused("folder", "train.tar is a file; .*data.source=tar", file)
    assert_refused("folder", "holds 'train' as a tar; set data.source=tar", tmp_path)
    flat = pack(image_set / "train", tmp_path / "flat.tar")
    assert_refused("tar", "flat.tar: no split 'train' in it; expected <split>/<class>/<image>", flat)


@pytest.mark.parametrize(("key", "value"), [("name", "mnist"), ("download", True)])
def test_what_names_an_idx_set_is_refused_for_other_sources(key: str, value: Any, image_set: Path) -> None:
    with pytest.raises(ConfigError, match=f"data.{key}: {str(value).lower()}, which only data.source=idx uses"):
        open_source(Data(source="folder", path=str(image_set), **{key: value}), "train")


def test_an_empty_class_folder_is_named(image_set: Path, pack: Callable[..., Path], tmp_path: Path) -> None:
    (image_set / "train" / "bird").mkdir()
    (image_set / "train" / "bird" / "notes.txt").write_bytes(b"x")
    assert_refused("folder", "train: class folder 'bird' holds no images", image_set)
    assert_refused("tar", "train: class folder 'bird' holds no images", pack(image_set, tmp_path / "set.tar"))
    assert_refused(
        "tar", "class folder 'bird' holds no images", pack(image_set / "train", tmp_path / "train.tar").parent
    )
    shutil.rmtree(image_set / "train")
    (image_set / "train").mkdir()
    assert_refused("folder", "train: no class folders", image_set)


def test_classes_are_those_of_the_train_split(
    image_set: Path, pack: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(image_set / "test" / "cat")
    for source, path in (("folder", image_set), ("tar", pack(image_set, tmp_path / "set.tar"))):
        caplog.clear()
        test = open_files(source, path, "test")
        assert test.class_names == ("cat", "dog") and test.labels.tolist() == [1] * 4
        assert "no images of 1 classes of the train split, such as 'cat'" in caplog.text
    (image_set / "test" / "dog").rename(image_set / "test" / "wolf")
    assert_refused("folder", "test: class 'wolf' is not among the 2 of the train split", image_set, "test")
    assert_refused("tar", "class 'wolf' is not among the 2", pack(image_set, tmp_path / "other.tar"), "test")
    shutil.rmtree(image_set / "train")
    assert open_files("folder", image_set, "test").class_names == ("wolf",)


def test_a_damaged_tar_is_named(image_set: Path, pack: Callable[..., Path], tmp_path: Path) -> None:
    plain, packed = pack(image_set, tmp_path / "a.tar"), pack(image_set, tmp_path / "b.tar.gz", "", "w:gz")
    original = plain.read_bytes()
    with tarfile.open(plain) as tar:
        middle, last = tar.getmembers()[10], tar.getmembers()[-1]
    plain.write_bytes(original[: last.offset_data + 5])
    assert_refused("tar", "a.tar: not a tar, or a damaged one", plain)
    plain.write_bytes(original[: middle.offset] + b"x" * 512 + original[middle.offset + 512 :])
    assert_refused("tar", "a.tar: damaged at byte", plain)
    plain.write_bytes(b"no tar at all" * 100)
    assert_refused("tar", "a.tar: not a tar", plain)
    packed.write_bytes(packed.read_bytes()[:-200])
    assert_refused("tar", "b.tar.gz: cannot be read", packed)


@pytest.mark.parametrize("name", ["../train/cat/0.png", "/train/cat/0.png", "train/../../cat/0.png"])
def test_a_member_that_reaches_outside_is_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert_refused("tar", "reaches outside", tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("train/cat/0.png")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(member)
    assert_refused("tar", "'train/cat/0.png' is a link, device", tmp_path / "a.tar")


def test_the_later_of_two_members_of_one_name_counts_and_a_warning_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for content in (b"old", b"newer"):
            add_file(tar, "train/cat/0.png", content)
    source = open_files("tar", tmp_path / "a.tar")
    assert len(source) == 1 and source.read(0) == b"newer"
    assert "a.tar: left out 1 images that a later one of the same name replaces (train/cat/0.png)" in caplog.text


def test_a_compressed_tar_past_the_memory_limit_says_how_to_unpack_it(
    image_set: Path, pack: Callable[..., Path], tmp_path: Path
) -> None:
    limit = 10_000 / 2**30
    file = pack(image_set, tmp_path / "set.tar.gz", "", "w:gz")
    assert_refused(
        "tar", "set.tar.gz: .* more than data.memory_limit_gb.*tar -xf.*data.source=folder", file, memory_limit_gb=limit
    )
    assert len(open_files("tar", pack(image_set, tmp_path / "set.tar"), memory_limit_gb=limit)) == 13


def test_cifar10_has_50000_and_10000_images(shared: Path, tmp_path: Path) -> None:
    cache = str(tmp_path)
    train = open_files("tar", shared / "cifar10", cache_dir=cache)
    test = open_files("tar", shared / "cifar10", "test", cache_dir=cache)
    assert len(train) == 50_000 and len(test) == 10_000
    assert train.class_names == test.class_names
    assert train.class_names[:4] == ("airplane", "automobile", "bird", "cat")
    assert np.bincount(train.labels).tolist() == [5000] * 10 and np.bincount(test.labels).tolist() == [1000] * 10
    assert train.names[-1].startswith("truck/") and decode(train.read(49_999), 3).shape == (32, 32, 3)
    pixels = open_arrays("tar", shared / "cifar10", "test", in_memory=True, cache_dir=cache)
    assert pixels.images.shape == (10_000, 32, 32, 3)
    assert np.array_equal(pixels.images[1234], decode(test.read(1234), 3))
    assert np.array_equal(pixels.labels, test.labels)


# in memory


def test_in_memory_is_the_decoded_files(image_set: Path) -> None:
    files = open_files("folder", image_set)
    for channels in (1, 3):
        pixels = open_source(Data(source="folder", path=str(image_set), in_memory=True), "train", channels)
        assert isinstance(pixels, ArraySource) and pixels.images.shape == (13, 12, 10, channels)
        assert np.array_equal(pixels.labels, files.labels) and pixels.class_names == files.class_names
        for i in range(13):
            assert np.array_equal(pixels.images[i], decode(files.read(i), channels))


def test_in_memory_decodes_chunks_of_images_in_order(image_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit_dist.data.sets.in_memory._CHUNK", 5)
    pixels = open_arrays("folder", image_set, in_memory=True)
    assert pixels.split == "train"
    files = open_files("folder", image_set)
    assert all(np.array_equal(pixels.images[i], decode(files.read(i), 3)) for i in range(13))
    tasks = []
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *task: tasks.append(task) or Future())
    with pytest.raises(TimeoutError):
        monkeypatch.setattr(Future, "result", lambda *_: (_ for _ in ()).throw(TimeoutError()))
        open_set("folder", image_set, in_memory=True)
    assert len(tasks) == 3


def test_in_memory_names_what_it_cannot_take(image_set: Path, encode: Callable[..., bytes]) -> None:
    dogs = image_set / "train" / "dog"
    assert_refused("folder", "data.in_memory: .*data.memory_limit_gb", image_set, in_memory=True, memory_limit_gb=1e-6)
    for i in (6, 3):
        (dogs / f"{i}.png").write_bytes(encode(0, (12, 11)))
    assert_refused("folder", "dog/3.png: 12x11 pixels, but .*cat/0.png has 12x10", image_set, in_memory=True)
    (dogs / "1.png").write_bytes(b"no image")
    assert_refused("folder", "dog/1.png: no known image format; .*data.in_memory=False", image_set, in_memory=True)


def test_files_decode_to_one_or_three_channels(image_set: Path) -> None:
    with pytest.raises(ConfigError, match="model.channels: 4, but image files are decoded to 1 or 3"):
        open_source(Data(source="folder", path=str(image_set)), "train", 4)


# labels and fingerprints


def test_a_label_out_of_range_is_named(idx_set: Path, image_set: Path) -> None:
    labels = np.array([3, 4, 200, 4, 10, 5, 6], np.uint8)
    write_idx(idx_set, "t10k", np.zeros((7, 5, 4), np.uint8), labels, packed=False)
    with pytest.raises(ConfigError, match=r"model.num_classes: .*\(id 2\) has label 200, .*not in 0..9; 2 of 7"):
        check_labels(open_set("idx", idx_set, "test"), 10)
    with pytest.raises(ConfigError, match=r"dog/0.png \(id 5\) has label 1"):
        check_labels(open_set("folder", image_set), 1)
    check_labels(open_set("folder", image_set), 2)


def test_different_sets_have_different_fingerprints(image_set: Path) -> None:
    source = open_files("folder", image_set)
    assert re.fullmatch("[0-9a-f]{16}", fingerprint(source))
    others = [
        dataclasses.replace(source, names=Names.of(("cat/x.png", *list(source.names)[1:]))),
        dataclasses.replace(source, class_names=("cat", "wolf")),
        dataclasses.replace(source, labels=source.labels[::-1]),
        open_files("folder", image_set, "test"),
    ]
    assert len({fingerprint(each) for each in (source, *others)}) == 5
    digits = open_set("digits", None)
    assert fingerprint(digits) == fingerprint(open_set("digits", None)) != fingerprint(open_set("digits", None, "test"))

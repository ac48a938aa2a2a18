"""Parquet: the ids, labels and bytes of the class folder, from every layout; reads by row group within a limit."""

import concurrent.futures
import functools
import json
import logging
import os
import pickle
import threading
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from containers import assert_refused, open_files

from vit_dist.data.sets.examples import fingerprint
from vit_dist.data.sets.formats.parquet import ParquetImages, RowGroups

_fails = functools.partial(assert_refused, "parquet")

IMAGE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
Rows = list[tuple[Any, Any]]


def _huggingface(names: tuple[str, ...], label: str = "label") -> dict[bytes, bytes]:
    features = {label: {"names": list(names), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    return {b"huggingface": json.dumps({"info": {"features": features}}).encode()}


def _write(
    file: Path,
    rows: Rows,
    classes: tuple[str, ...] = (),
    columns: tuple[str, str] = ("image", "label"),
    kind: Any = IMAGE,
    label: Any = pyarrow.int64(),  # noqa: B008
    group: int = 3,
    open_file: Any = None,
) -> Path:
    images = pyarrow.array([image for image, _ in rows], kind)
    labels = pyarrow.array([label for _, label in rows], label)
    table = pyarrow.table({columns[0]: images, columns[1]: labels})
    if classes:
        table = table.replace_schema_metadata(_huggingface(classes, columns[1]))
    if open_file is None:
        file.parent.mkdir(parents=True, exist_ok=True)
    with (open_file or open)(file, "wb") as stream:
        pyarrow.parquet.write_table(table, stream, row_group_size=group)
    return file


def _rows(folder: Path, classes: tuple[str, ...] = ("cat", "dog")) -> Rows:
    """The images of a class folder, shuffled."""
    files = sorted(folder.glob("*/*"))
    order = np.random.default_rng(3).permutation(len(files))
    shuffled = [files[number] for number in order]
    return [
        ({"bytes": file.read_bytes(), "path": f"somewhere/{file.name}"}, classes.index(file.parent.name))
        for file in shuffled
    ]


def _layout(root: Path, names: dict[str, tuple[str, ...]], image_set: Path) -> Path:
    """The image set as Parquet files of these names."""
    for split, files in names.items():
        rows = _rows(image_set / split)
        for file, numbers in zip(files, np.array_split(np.arange(len(rows)), len(files))):
            _write(root / file, [rows[number] for number in numbers], ("cat", "dog"))
    return root


LAYOUTS = {
    "data": {
        "train": ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"),
        "test": ("data/test-00000-of-00001-0123abc.parquet",),
    },
    "flat": {"train": ("train_0.parquet", "train_1.parquet"), "test": ("test.parquet",)},
    "folders": {"train": ("train/0000.parquet", "train/0001.parquet"), "test": ("test/0000.parquet",)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_labels_and_bytes_are_those_of_the_class_folder(layout: str, image_set: Path, tmp_path: Path) -> None:
    root = _layout(tmp_path / "parquet", LAYOUTS[layout], image_set)
    for split in ("train", "test", "val"):
        folder, parquet = open_files("folder", image_set, split), open_files("parquet", root, split)
        assert len(parquet) == {"train": 13, "test": 7, "val": 7}[split]
        assert parquet.split == {"train": "train", "test": "test", "val": "test"}[split]
        assert parquet.class_names == folder.class_names and list(parquet.names) == list(folder.names)
        assert parquet.labels.dtype == np.int32 and np.array_equal(parquet.labels, folder.labels)
        assert [parquet.read(i) for i in range(len(parquet))] == [folder.read(i) for i in range(len(folder))]
        assert fingerprint(parquet) == fingerprint(folder)


def test_one_file_is_the_split_of_its_name(image_set: Path, tmp_path: Path) -> None:
    rows = _rows(image_set / "test")
    file = _write(tmp_path / "test-00000-of-00001.parquet", rows, ("cat", "dog"))
    assert len(open_files("parquet", file, "val")) == 7
    _fails("is one file of one split, and not of 'train'.*train-", file, "train")
    assert len(open_files("parquet", _write(tmp_path / "photos.parquet", rows))) == 7
    _fails("one file of one split, and not of 'test'", tmp_path / "photos.parquet", "test")
    named = _write(tmp_path / "cifar10-validation.parquet", rows)
    assert len(open_files("parquet", named, "test")) == 7 and open_files("parquet", named, "test").split == "validation"
    _fails("one file of one split, and not of 'train'", named)


def test_a_split_name_is_not_a_pattern(image_set: Path, tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet", _rows(image_set / "train"))
    for split in ("(", "tr..n", "train|test"):
        _fails("no .*parquet in .*found: .*train.parquet", tmp_path, split)


def test_metadata_of_another_kind_names_no_classes(tmp_path: Path) -> None:
    file = tmp_path / "train.parquet"
    for text in ("[1]", "3", '{"info": {"features": []}}', '{"info": {"features": {"label": {"names": null}}}}'):
        _write(file, [({"bytes": b"a", "path": None}, 1)])
        table = pyarrow.parquet.read_table(file).replace_schema_metadata({"huggingface": text})
        pyarrow.parquet.write_table(table, file)
        assert open_files("parquet", file).class_names == ("0", "1")
    for names in ('"cat"', "[1, 2]", '{"0": "cat"}'):
        text = f'{{"info": {{"features": {{"label": {{"names": {names}}}}}}}}}'
        pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": text}), file)
        _fails("train.parquet: its metadata 'huggingface' names no classes but .*; expected a list", file)


def test_paths_that_are_no_utf8_are_read(tmp_path: Path) -> None:
    paths = pyarrow.array([b"caf\xe9.png", b"caf\xe8.png"], pyarrow.binary()).view(pyarrow.string())
    images = pyarrow.StructArray.from_arrays([pyarrow.array([b"a", None], pyarrow.binary()), paths], ["bytes", "path"])
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": [0, 1]}), tmp_path / "train.parquet")
    beside = tmp_path / b"caf\xe8.png".decode("utf-8", "surrogateescape")
    beside.write_bytes(b"beside")
    source = open_files("parquet", tmp_path)
    assert [name.encode("utf-8", "surrogateescape") for name in source.names] == [b"0/caf\xe9.png", b"1/caf\xe8.png"]
    assert [source.read(0), source.read(1)] == [b"a", b"beside"]


def test_classes_are_numbered_as_the_metadata_has_them(image_set: Path, tmp_path: Path) -> None:
    file = _write(tmp_path / "train.parquet", _rows(image_set / "train", ("dog", "cat")), ("dog", "cat"))
    source = open_files("parquet", file)
    assert source.class_names == ("dog", "cat")
    assert source.labels.tolist() == [0] * 8 + [1] * 5 and source.names[0] == "dog/0.png"
    assert source.read(0) == (image_set / "train/dog/0.png").read_bytes()


def test_without_metadata_classes_are_numbers_and_those_of_the_train_split(tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet", [({"bytes": b"a", "path": None}, label) for label in (3, 0, 1)])
    _write(tmp_path / "test.parquet", [({"bytes": b"a", "path": None}, label) for label in (1, 0)])
    assert open_files("parquet", tmp_path).class_names == tuple("0123")
    test = open_files("parquet", tmp_path, "test")
    assert test.class_names == tuple("0123") and test.labels.tolist() == [0, 1]
    _write(tmp_path / "test.parquet", [({"bytes": b"a", "path": None}, 4)])
    _fails("class '4' is not among the 4 of the train split", tmp_path, "test")


def test_ids_follow_the_train_splits_order_of_classes(image_set: Path, tmp_path: Path) -> None:
    _write(tmp_path / "train.parquet", _rows(image_set / "train"), ("cat", "dog"))
    _write(tmp_path / "test.parquet", _rows(image_set / "test", ("dog", "cat")), ("dog", "cat"))
    parquet, folder = open_files("parquet", tmp_path, "test"), open_files("folder", image_set, "test")
    assert fingerprint(parquet) == fingerprint(folder)
    assert [parquet.read(i) for i in range(7)] == [folder.read(i) for i in range(7)]


def test_rows_without_a_path_are_named_by_their_number(tmp_path: Path) -> None:
    rows = [(b"zero", 1), (b"one", 0), (b"two", 1)]
    plain = _write(tmp_path / "plain.parquet", rows, columns=("img", "fine_label"), kind=pyarrow.binary(), group=2)
    struct = _write(tmp_path / "struct.parquet", [({"bytes": data, "path": None}, label) for data, label in rows])
    for file in (plain, struct):
        source = open_files("parquet", file)
        assert list(source.names) == ["0/00000001", "1/00000000", "1/00000002"]
        assert [source.read(i) for i in range(3)] == [b"one", b"zero", b"two"]


def test_a_source_can_be_pickled_without_its_row_groups(image_set: Path, tmp_path: Path) -> None:
    source = open_files("parquet", _layout(tmp_path / "parquet", LAYOUTS["data"], image_set))
    expected = [source.read(i) for i in range(13)]
    pickled = pickle.dumps(source)
    assert len(pickled) < sum(map(len, expected))
    copy = pickle.loads(pickled)
    assert [copy.read(i) for i in range(13)] == expected


def _big(tmp_path: Path) -> tuple[Path, list[bytes]]:
    """Ten groups of ten images of 1,000 bytes."""
    images = [bytes([number]) * 1000 for number in range(100)]
    return _write(tmp_path / "train.parquet", [(data, 0) for data in images], kind=pyarrow.binary(), group=10), images


def _counting(groups: RowGroups) -> list[tuple[int, int]]:
    reads: list[tuple[int, int]] = []
    read = groups._read

    def counted(key: tuple[int, int]) -> Any:
        reads.append(key)
        return read(key)

    groups._read = counted  # type: ignore[method-assign]
    return reads


def test_a_row_group_is_read_once_by_all_threads_where_all_fit(tmp_path: Path) -> None:
    file, images = _big(tmp_path)
    source = open_files("parquet", file)
    assert isinstance(source.images, ParquetImages)
    reads = _counting(source.images.groups)
    together = threading.Barrier(8)

    def read(seed: int) -> bool:
        together.wait()
        return all(source.read(i) == images[i] for i in np.random.default_rng(seed).permutation(100).tolist())

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))
    assert sorted(reads) == [(0, group) for group in range(10)]


def test_the_groups_used_longest_ago_are_evicted(tmp_path: Path) -> None:
    file, images = _big(tmp_path)
    groups = RowGroups((file,), limit=25_000)
    reads = _counting(groups)

    def read(*numbers: int) -> list[int]:
        reads.clear()
        for number in numbers:
            assert groups.column(0, number)[4].as_py() == images[10 * number + 4]
            assert groups._total <= 25_000 and groups._total == sum(groups._sizes.values())
        return [group for _, group in reads]

    assert read(0, 1, 0) == [0, 1]
    assert read(2) == [2]  # in place of 1
    assert read(0) == []
    assert read(1) == [1]
    assert read(2) == [2]


def test_many_threads_read_right_bytes_in_little_memory(tmp_path: Path) -> None:
    file, images = _big(tmp_path)
    groups = RowGroups((file,), limit=15_000)
    order = np.random.default_rng(0).integers(0, 100, 1000).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda i: groups.column(0, i // 10)[i % 10].as_py(), order)
        assert list(found) == [images[i] for i in order]
    assert groups._total <= 15_000


def test_a_set_larger_than_the_limit_logs_its_cost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _write(tmp_path / "train.parquet", [(os.urandom(1 << 16), 0) for _ in range(64)], kind=pyarrow.binary(), group=16)
    caplog.set_level(logging.WARNING)
    open_files("parquet", tmp_path)
    assert not caplog.records
    source = open_files("parquet", tmp_path, memory_limit_gb=2 / 1024)  # half of it: 1 MiB a group, 1 in 2 held
    (record,) = caplog.records
    assert "costs 0.5 MiB (row groups of 16 images)" in record.getMessage()
    assert f"`vit-dist prepare {tmp_path} DEST`" in record.getMessage()
    assert isinstance(source.images, ParquetImages) and source.images.groups.limit == 2 << 20
    workers = open_files("parquet", tmp_path, memory_limit_gb=2 / 1024, workers=4)
    assert isinstance(workers.images, ParquetImages) and workers.images.groups.limit == 1 << 19


def test_images_beside_the_shard_are_read_and_none_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "set/images").mkdir(parents=True)
    (tmp_path / "set/images/a.jpg").write_bytes(b"beside")
    (tmp_path / "secret").write_bytes(b"secret")
    paths = ["images/a.jpg", "images/b.jpg", "../secret", str(tmp_path / "secret")]
    rows: Rows = [({"bytes": None, "path": path}, label) for label, path in enumerate(paths)]
    _write(tmp_path / "set/train.parquet", [*rows, (None, 4), ({"bytes": None, "path": None}, 4)])
    source = open_files("parquet", tmp_path / "set")
    assert source.read(0) == b"beside"
    errors = ["images/b.jpg, which is not in", "path outside of", "path outside of", "holds no image", "holds no image"]
    for number, message in enumerate(errors, 1):
        with pytest.raises(OSError, match=message):
            source.read(number)


def test_labels_that_are_hidden_missing_or_of_no_class_are_named(tmp_path: Path) -> None:
    rows: Rows = [({"bytes": b"a", "path": None}, label) for label in (0, -1, 2)]
    _write(tmp_path / "test.parquet", [(image, -1) for image, _ in rows], ("cat", "dog"))
    _fails("test.parquet: row 0 has label -1, expected 0..1; this split's labels are hidden", tmp_path, "test")
    _write(tmp_path / "train.parquet", rows)
    _fails("train.parquet: row 1 has label -1, expected 0..999999; repair it", tmp_path)
    _write(tmp_path / "train.parquet", rows[::2], ("cat", "dog"))
    _fails("train.parquet: row 1 has label 2, expected 0..1", tmp_path)
    _write(tmp_path / "train.parquet", [*rows[:1], (rows[0][0], None)])
    _fails("train.parquet: 1 of 2 labels are null", tmp_path)
    _write(tmp_path / "train.parquet", [(rows[0][0], 2**32 + 1)])
    _fails("train.parquet: row 0 has label 4294967297, expected 0..999999", tmp_path)


def test_damaged_files_are_named(image_set: Path, tmp_path: Path) -> None:
    root = _layout(tmp_path / "parquet", LAYOUTS["flat"], image_set)
    file = root / "train_1.parquet"
    original = file.read_bytes()
    for damaged in (b"", b"no parquet", original[:-10], original[: len(original) // 2]):
        file.write_bytes(damaged)
        _fails("train_1.parquet: cannot be read as Parquet", root)


def test_a_row_group_damaged_since_is_an_unreadable_image(tmp_path: Path) -> None:
    file, images = _big(tmp_path)
    source = open_files("parquet", file)
    original = file.read_bytes()
    file.write_bytes(original[:200] + b"\xff" * 100 + original[300:])
    with pytest.raises(OSError, match=r"row group 0 of .*train.parquet cannot be read"):
        source.read(0)
    assert source.read(99) == images[99]
    file.write_bytes(original)
    assert source.read(0) == images[0]  # a failure is not kept


def test_missing_shards_and_splits_are_named(image_set: Path, tmp_path: Path) -> None:
    root = _layout(tmp_path / "parquet", LAYOUTS["data"], image_set)
    (root / "data/train-00000-of-00002.parquet").unlink()
    _fails("1 shards beside train-00001-of-00002.parquet, expected 2: shard 0 is missing", root)
    _fails("no extra-.*parquet in .*found: data", root, "extra")
    (tmp_path / "empty").mkdir()
    _fails("no train-.*found: nothing", tmp_path / "empty")


def test_columns_that_do_not_fit_are_named(tmp_path: Path) -> None:
    rows: Rows = [(b"a", 0)]
    file = _write(tmp_path / "train.parquet", rows, columns=("picture", "label"), kind=pyarrow.binary())
    _fails("no column 'image' or 'img'; it has: picture, label", file)
    _write(file, rows, columns=("image", "class"), kind=pyarrow.binary())
    _fails("no column 'label' or .*it has: image, class", file)
    _write(file, [("a.jpg", 0)], kind=pyarrow.string())
    _fails("column 'image' is string, expected struct<bytes, path> or binary", file)
    _write(file, [({"path": "a"}, 0)], kind=pyarrow.struct({"path": pyarrow.string()}))
    _fails("column 'image' is struct<path: string>, expected struct<bytes, path> or binary", file)
    _write(file, [(b"a", "cat")], kind=pyarrow.binary(), label=pyarrow.string())
    _fails("column 'label' is string, expected whole numbers", file)
    _write(file, [], kind=pyarrow.binary())
    _fails("holds no rows", file)


def test_shards_must_agree_on_the_classes(tmp_path: Path) -> None:
    rows: Rows = [({"bytes": b"a", "path": None}, 0)]
    _write(tmp_path / "train_0.parquet", rows, ("cat", "dog"))
    _write(tmp_path / "train_1.parquet", rows, ("dog", "cat"))
    _fails("train_1.parquet: its metadata names other classes than train_0.parquet", tmp_path)


def test_parquet_is_read_from_remote_storage(image_set: Path) -> None:
    remote = fsspec.filesystem("memory")
    root = f"/{uuid.uuid4()}"
    for split in ("train", "test"):
        name = f"{root}/data/{split}-00000-of-00001.parquet"
        remote.mkdirs(f"{root}/data", exist_ok=True)
        _write(
            Path(name),
            _rows(image_set / split),
            ("cat", "dog"),
            open_file=lambda file, mode: remote.open(str(file), mode),
        )
        source, folder = open_files("parquet", f"memory:/{root}", split), open_files("folder", image_set, split)
        assert fingerprint(source) == fingerprint(folder)
        assert [source.read(i) for i in range(len(source))] == [folder.read(i) for i in range(len(folder))]


def test_cifar10_is_the_same_from_parquet_and_tar(shared: Path, tmp_path: Path) -> None:
    tar = open_files("tar", shared / "cifar10/test.tar.gz", "test")
    order = np.random.default_rng(0).permutation(len(tar)).tolist()
    rows: Rows = [({"bytes": tar.read(i), "path": tar.names[i]}, int(tar.labels[i])) for i in order]
    _write(tmp_path / "test-00000-of-00002.parquet", rows[:6000], tar.class_names, ("img", "label"), group=100)
    _write(tmp_path / "test-00001-of-00002.parquet", rows[6000:], tar.class_names, ("img", "label"), group=100)
    parquet = open_files("parquet", tmp_path, "test", cache_dir=str(tmp_path / "cache"))
    assert len(parquet) == 10_000 and fingerprint(parquet) == fingerprint(tar)
    assert all(parquet.read(i) == tar.read(i) for i in order)
    again = open_files("parquet", tmp_path, "test", cache_dir=str(tmp_path / "cache"))
    assert len(list((tmp_path / "cache").glob("index-*.npz"))) == 1 and again.read(77) == tar.read(77)

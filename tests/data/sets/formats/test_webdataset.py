"""WebDataset shards: the same examples as the folder, whatever the shards, and how their labels are found."""

import functools
import gzip
import json
import logging
import pickle
import random
import resource
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import fsspec
import pytest
from containers import add_file, assert_refused, assert_same, open_files

from vit_dist.data.files import location
from vit_dist.data.sets import index
from vit_dist.data.sets.formats.webdataset import find_shards

_files = functools.partial(open_files, "webdataset")
_fails = functools.partial(assert_refused, "webdataset")

CLASSES = ("cat", "dog")
Sample = tuple[str, dict[str, bytes]]  # key, and its files by suffix


def _write(file: Path, samples: Iterable[Sample], mode: str = "w") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as tar:  # type: ignore[call-overload]
        for key, files in samples:
            for suffix, content in files.items():
                add_file(tar, f"{key}.{suffix}" if suffix else key, content)
    return file


def _samples(folder: Path, split: str, label: Callable[[int, str], dict[str, bytes]]) -> list[Sample]:
    """The images of a split of class folders, shuffled, with keys such as `cat/3` and the files that `label` makes."""
    found = [
        (f"{name}/{file.stem}", {"png": file.read_bytes(), **label(number, name)})
        for number, name in enumerate(CLASSES)
        for file in sorted((folder / split / name).iterdir())
    ]
    random.Random(0).shuffle(found)
    return found


LABELS: dict[str, Callable[[int, str], dict[str, bytes]]] = {
    "cls": lambda number, name: {"cls": str(number).encode()},
    "json": lambda number, name: {"json": json.dumps({"label": number, "width": 10}).encode()},
    "json cls": lambda number, name: {"json": json.dumps({"caption": "x", "cls": str(number)}).encode()},
    "both": lambda number, name: {"json": b'{"label": 7, "filename": "x"}', "cls": b"%d\n" % number},
}


@pytest.fixture
def shards(image_set: Path, tmp_path: Path) -> Callable[..., Path]:
    """`shards(label, names, mode)`: the splits of `image_set` in three shards each, and their `classes.txt`."""

    def shards(label: str = "cls", name: str = "set-{split}-{i:04d}.tar", mode: str = "w") -> Path:
        root = tmp_path / "shards"
        for split in ("train", "test"):
            samples = _samples(image_set, split, LABELS[label])
            for i in range(3):
                _write(root / name.format(split=split, i=i), samples[i::3], mode)
        (root / "classes.txt").write_text("cat\ndog\n")
        return root

    return shards


@pytest.mark.parametrize("label", LABELS)
def test_shards_are_the_folder_wherever_the_label_is(shards: Callable[..., Path], image_set: Path, label: str) -> None:
    root = shards(label)
    for split in ("train", "test"):
        assert_same(_files(root, split), open_files("folder", image_set, split))


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("{split}/{i:05d}.tar", "w"),
        ("{split}/{i:05d}.tar.gz", "w:gz"),
        ("imagenet1k-{split}-{i:04d}.tar", "w"),
        ("{split}{i}.tgz", "w:gz"),
        ("train-and-test-{split}_{i}.tar", "w"),
    ],
)
def test_splits_are_folders_or_words_of_the_shards_names(
    shards: Callable[..., Path], image_set: Path, name: str, mode: str
) -> None:
    root = shards("cls", name, mode)
    for split in ("train", "test"):
        assert_same(_files(root, split), open_files("folder", image_set, split))


def test_validation_shards_stand_for_test(tmp_path: Path) -> None:
    for name in ("imagenet1k-validation-01.tar", "imagenet1k-validation-00.tar", "imagenet1k-train-0000.tar"):
        _write(tmp_path / name, [])
    _write(tmp_path / "._imagenet1k-train-0000.tar", [])
    (tmp_path / "constrained-0001.tar").write_bytes(b"")
    name, shards = find_shards(tmp_path, "test")
    assert name == "validation" and [file.name[-6:] for file in shards] == ["00.tar", "01.tar"]
    assert find_shards(tmp_path, "val") == find_shards(tmp_path, "test")
    assert [file.name for file in find_shards(tmp_path, "train")[1]] == ["imagenet1k-train-0000.tar"]
    assert find_shards(tmp_path, "extra") == ("", [])
    for name in ("imagenet1k-train2-0000.tar", "train-extra3.tar"):
        _write(tmp_path / name, [])
    assert [file.name for file in find_shards(tmp_path, "train2")[1]] == ["imagenet1k-train2-0000.tar"]
    assert [file.name for file in find_shards(tmp_path, "extra")[1]] == ["train-extra3.tar"]


def test_the_order_does_not_depend_on_how_samples_are_dealt_to_shards(image_set: Path, tmp_path: Path) -> None:
    samples = _samples(image_set, "train", LABELS["cls"])
    for count in (1, 5):
        for i in range(count):
            _write(tmp_path / f"{count}" / f"train-{i}.tar", samples[i::count])
    single, five = _files(tmp_path / "1"), _files(tmp_path / "5")
    assert_same(single, five)
    assert tuple(single.names)[:6] == ("cat/0.png", "cat/1.png", "cat/2.png", "cat/3.png", "cat/4.png", "dog/0.png")
    assert single.class_names == ("0", "1")  # nothing calls them anything else


def test_classes_are_named_by_a_file_or_the_samples_or_their_numbers(
    image_set: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def called(number: int, name: str) -> dict[str, bytes]:
        return {"cls": b"%d" % (2 * number), "json": json.dumps({"class_name": name.title()}).encode()}

    _write(tmp_path / "train-0.tar", _samples(image_set, "train", called))
    _write(
        tmp_path / "test-0.tar", _samples(image_set, "test", LABELS["cls"])[:0] + [("a", {"png": b"x", "cls": b"2"})]
    )
    assert _files(tmp_path).class_names == ("Cat", "1", "Dog")
    assert _files(tmp_path).labels.tolist() == [0] * 5 + [2] * 8
    test = _files(tmp_path, "test")
    assert test.class_names == ("Cat", "1", "Dog") and test.labels.tolist() == [2]  # by number
    (tmp_path / "classnames.txt").write_text("crane\ndog\ncrane\nowl\n")
    for split in ("train", "test"):
        assert _files(tmp_path, split).class_names == ("crane (0)", "dog", "crane (2)", "owl")
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    _fails("label 2, but 2 classes are listed", tmp_path)
    (tmp_path / "classnames.txt").unlink()
    mixed = _samples(image_set, "train", called) + [("z", {"png": b"x", "cls": b"0", "json": b'{"class_name": "Eel"}'})]
    _write(tmp_path / "train-0.tar", mixed)
    assert _files(tmp_path).class_names == ("0", "1", "2")
    assert "one label name several classes" in caplog.text


def test_labels_may_be_names_of_classes(image_set: Path, tmp_path: Path) -> None:
    def named(number: int, name: str) -> dict[str, bytes]:
        return {"json": json.dumps({"label": name}).encode()}

    for split in ("train", "test"):
        _write(tmp_path / f"{split}-0.tar", _samples(image_set, split, named))
        assert_same(_files(tmp_path, split), open_files("folder", image_set, split))
    _write(tmp_path / "test-0.tar", [("a", {"png": b"x", "cls": b" dog\n"})])
    assert _files(tmp_path, "test").labels.tolist() == [1] and _files(tmp_path, "test").class_names == CLASSES
    _write(tmp_path / "test-0.tar", [("a", {"png": b"x", "cls": b"eel"})])
    _fails("class 'eel' is not among the 2 of the train split", tmp_path, "test")
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    _fails("label 'eel' is not among the 2 classes that are listed", tmp_path, "test")
    assert _files(tmp_path).labels.tolist() == [0] * 8 + [1] * 5  # in the order of the list
    (tmp_path / "classes.txt").unlink()
    _write(tmp_path / "train-1.tar", [("a", {"png": b"x", "cls": b"1"})])
    _fails(r"some labels are numbers \(1\), some are names \('cat'\); list the names in classes.txt", tmp_path)


def test_samples_without_image_or_label_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = ("a.b/k.x", {"JPG": b"image", "cls": b"1", "txt": b"a caption"})  # its key is a.b/k
    _write(tmp_path / "train-0.tar", [("0", {"png": b"x"}), ("1", {"cls": b"0"}), ("README", {"": b"x"})])
    _fails("no sample with an image and a label; expected KEY.jpg beside KEY.cls", tmp_path)
    bad = [b"{", b"[]", b"{}", b'{"label": null}', b'{"label": [1, 2]}', b'{"label": -1}', b'{"label": true}', b"\xff"]
    samples = [(f"bad{i}", {"png": b"x", "json": content}) for i, content in enumerate(bad)]
    samples += [("empty", {"png": b"x", "cls": b" "}), ("skipped", {"png": b"x", "cls": b"-1"})]
    floats = ("float", {"webp": b"y", "json": b'{"label": 2.0}'})
    _write(tmp_path / "train-1.tar", [*samples, ("._k", {"png": b"x", "cls": b"0"}), floats])
    _write(tmp_path / "train-2.tar", [("key", {"jpg": b"z", "cls": b"0"}), (good[0].replace(".x", ""), good[1])])
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        source = _files(tmp_path)
    assert tuple(source.names) == ("key.jpg", "a.b/k.JPG", "float.webp") and source.labels.tolist() == [0, 1, 2]
    assert [source.read(i) for i in range(3)] == [b"z", b"image", b"y"]
    assert len(caplog.records) == 1 and "left out 15 samples or files without an image or a label" in caplog.text


def test_what_is_ambiguous_or_unsafe_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "train-0.tar"
    _write(file, [("a", {"png": b"x", "cls": b"1"}), ("a", {"png": b"y", "cls": b"0"})])
    _fails("train-0.tar: holds 'a.png' twice", tmp_path)
    _write(file, [("a", {"png": b"x", "jpg": b"x", "cls": b"1"})])
    _fails("train-0.tar: 'a.png' and 'a.jpg' are images of one sample", tmp_path)
    _write(file, [("../a", {"png": b"x", "cls": b"1"})])
    _fails("'../a.png' reaches outside", tmp_path)
    _write(file, [("a", {"png": b"x", "cls": b"9999999"})])
    _fails("label 9999999 is not a class number", tmp_path)
    with tarfile.open(file, "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    _fails("'a.png' is a link, device", tmp_path)
    file.write_bytes(b"no tar" * 1000)
    _write(tmp_path / "train-1.tar", [("a", {"png": b"x", "cls": b"1"})])
    _fails("train-0.tar: not a tar", tmp_path)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    file = _write(tmp_path / "00000.tar", [("a", {"png": b"x", "cls": b"1"})])
    _fails(
        "no shards of 'test' in .*; expected test or val or validation as a folder .*found: 00000.tar", tmp_path, "test"
    )
    _fails("00000.tar is a file; data.source=webdataset needs the folder", file)


def test_compressed_shards_share_the_limit_of_memory(shards: Callable[..., Path]) -> None:
    root = shards("cls", "{split}/{i}.tar.gz", "w:gz")
    size = sum(len(gzip.decompress(file.read_bytes())) for file in (root / "train").iterdir())
    _fails("tar.gz: .* more than data.memory_limit_gb.*decompress the shards", root, memory_limit_gb=(size - 1) / 2**30)
    assert len(_files(root, memory_limit_gb=size / 2**30)) == 13
    shared = "than data.memory_limit_gb=.* / 2 .this process and each worker .*raise it, take fewer data.workers, or"
    _fails(shared, root, memory_limit_gb=(2 * size - 2) / 2**30, workers=1)
    assert len(_files(root, memory_limit_gb=2 * size / 2**30, workers=1)) == 13


def test_the_index_is_kept_until_a_shard_changes(
    shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_CACHED_FROM", 1)
    root, cache = shards("cls", "{split}/{i}.tar.gz", "w:gz"), str(tmp_path / "cache")
    expected = {split: _files(root, split, cache_dir=cache) for split in ("train", "test")}
    with monkeypatch.context() as patched:
        patched.setattr("vit_dist.data.sets.formats.webdataset._scan_shard", None)
        for split, source in expected.items():
            assert_same(_files(root, split, cache_dir=cache), source)
    _write(root / "train" / "3.tar", [("more", {"png": b"x", "cls": b"1"})])
    assert len(_files(root, cache_dir=cache)) == 14
    (root / "classes.txt").write_text("kitten\npuppy\n")
    assert _files(root, cache_dir=cache).class_names == ("kitten", "puppy")


@pytest.mark.parametrize(("name", "mode"), [("{split}/{i}.tar", "w"), ("{split}-{i}.tar.gz", "w:gz")])
def test_shards_are_read_behind_fsspec_and_in_workers(
    shards: Callable[..., Path], image_set: Path, tmp_path: Path, name: str, mode: str
) -> None:
    root = shards("json", name, mode)
    remote = location(f"memory://{tmp_path.name}")
    fsspec.filesystem("memory").put(f"{root}/", f"/{tmp_path.name}", recursive=True)
    for split in ("train", "test"):
        source = _files(remote, split)
        assert_same(source, open_files("folder", image_set, split))
        assert_same(pickle.loads(pickle.dumps(source)), source)
        assert_same(pickle.loads(pickle.dumps(_files(root, split))), source)


def test_more_shards_than_a_process_may_open_files(tmp_path: Path) -> None:
    for i in range(200):
        _write(tmp_path / f"train-{i:04d}.tar", [(f"{i:04d}", {"png": b"%d" % i, "cls": b"0"})])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        open_now = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 64
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 64, hard))
        source = _files(tmp_path)
        assert [source.read(i) for i in range(200)] == [b"%d" % i for i in range(200)]
        assert 200 < resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

"""The index of a split: packed, in order of ids, built once."""

import concurrent.futures
import dataclasses
import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from peak import PEAK_BYTES

from vit_dist.config import ConfigError, Data
from vit_dist.data.sets import index
from vit_dist.data.sets.examples import file_source
from vit_dist.data.sets.index import Index, Names, cached, sorted_index
from vit_dist.data.sets.sources import open_source


def test_packed_names_read_as_they_were() -> None:
    names = ["", "cat/1.jpg", "katze/ä.jpg", "bytes/\udcff.jpg", "犬/0.png"]
    packed = Names.of(names)
    assert list(packed) == names and len(packed) == 5 and packed[-1] == names[-1]
    assert list(packed.take([4, 0])) == [names[4], names[0]]
    with pytest.raises(IndexError):
        packed[5]
    assert list(Names.of([])) == []


def test_a_million_names_take_no_more_than_their_bytes() -> None:
    packed = Names.of(f"n01440764/n01440764_{number}.JPEG" for number in range(20_000))
    size = packed.text.nbytes + packed.ends.nbytes
    assert size < 20_000 * 42
    assert sum(sys.getsizeof(name) for name in packed) > 1.8 * size


def test_ids_follow_class_then_name_and_spans_go_along() -> None:
    result = sorted_index(["a", "b"], ["b/2", "a/9", "b/1", "a/1"], [1, 0, 1, 0], [(0, i, 1) for i in range(4)])
    assert list(result.names) == ["a/1", "a/9", "b/1", "b/2"]
    assert result.labels.tolist() == [0, 0, 1, 1] and result.labels.dtype == np.int32
    assert result.spans[:, 1].tolist() == [3, 1, 2, 0]


def test_labels_follow_the_classes_of_the_train_split() -> None:
    result = sorted_index(["b", "d"], ["b/1", "d/1"], [0, 1])
    assert result.with_classes(("a", "b", "c", "d"), "test").labels.tolist() == [1, 3]
    with pytest.raises(ConfigError, match="test: class 'd' is not among the 2"):
        result.with_classes(("a", "b"), "test")


def test_ids_follow_the_train_splits_order_of_classes_and_spans_go_along() -> None:
    result = sorted_index(["b", "d"], ["b/1", "b/2", "d/1", "d/2"], [0, 0, 1, 1], [(0, i, 1) for i in range(4)])
    other = result.with_classes(("d", "b"), "test")
    assert list(other.names) == ["d/1", "d/2", "b/1", "b/2"] and other.labels.tolist() == [0, 0, 1, 1]
    assert other.spans[:, 1].tolist() == [2, 3, 0, 1]


@pytest.fixture
def large() -> Index:
    return sorted_index(["a", "b"], [f"{number:05}" for number in range(12_000)], [0, 1] * 6_000)


def test_a_large_index_is_built_once_and_anew_when_its_stamp_changes(large: Index, tmp_path: Path) -> None:
    built = []

    def build() -> Index:
        built.append(1)
        return large

    for stamp, count in (("one", 1), ("one", 1), ("two", 2), ("two", 2), ("one", 3)):
        result = cached("set", stamp, str(tmp_path), build)
        assert len(built) == count
        assert list(result.names) == list(large.names) and np.array_equal(result.labels, large.labels)
        assert result.class_names == large.class_names and not len(result.spans)
    cached("another set", "one", str(tmp_path), build)
    assert len(built) == 4


def test_an_index_of_another_format_is_not_read(large: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached("set", "one", str(tmp_path), lambda: large)
    other = dataclasses.replace(large, class_names=("c", "d"))
    assert cached("set", "one", str(tmp_path), lambda: other).class_names == ("a", "b")
    monkeypatch.setattr(index, "_FORMAT", 99)
    assert cached("set", "one", str(tmp_path), lambda: other).class_names == ("c", "d")


def test_an_index_logs_its_notes_whenever_it_is_opened(
    large: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    large = dataclasses.replace(large, split="val", notes=("left out 3 files", "and ä"))
    for _ in range(2):
        caplog.clear()
        result = cached("set", "one", str(tmp_path), lambda: large)
        assert result.split == "val" and file_source("test", "val", result, Nothing()).split == "val"
        assert [record.message for record in caplog.records] == ["left out 3 files", "and ä"]


class Nothing:
    def read(self, index: int) -> bytes:
        raise OSError


def test_an_index_in_the_making_holds_up_only_those_that_need_it(
    large: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    building, go_on = threading.Event(), threading.Event()

    def slowly() -> Index:
        building.set()
        assert go_on.wait(30)
        return large

    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # each with a lock of its own, as two processes
        first = pool.submit(cached, "set", "one", str(tmp_path), slowly)
        assert building.wait(30)
        cached("another set", "one", str(tmp_path), lambda: large)
        assert "waiting" not in caplog.text
        second = pool.submit(cached, "set", "one", str(tmp_path), slowly)
        while "waiting for another process that indexes set" not in caplog.text:
            assert not second.done()
            time.sleep(0.01)
        building.clear()
        go_on.set()
        assert first.result() is large and len(second.result()) == 12_000
    assert not building.is_set()  # it was built once
    assert [file.suffix for file in tmp_path.iterdir()] == [".npz"] * 2


def test_an_index_that_is_there_is_read_while_another_holds_the_lock(large: Index, tmp_path: Path) -> None:
    cached("set", "one", str(tmp_path), lambda: large)
    (file,) = tmp_path.glob("*.npz")
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert len(cached("set", "one", str(tmp_path), lambda: large)) == 12_000


def test_a_small_index_is_not_cached(tmp_path: Path) -> None:
    cached("set", "one", str(tmp_path), lambda: sorted_index(["a"], ["1"], [0]))
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_index_is_built_again(large: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cached("set", "one", str(tmp_path), lambda: large)
    (file,) = tmp_path.glob("*.npz")
    original = file.read_bytes()
    for damaged in (b"", original[: len(original) // 2], original[:100] + bytes(1000) + original[1100:]):
        file.write_bytes(damaged)
        assert list(cached("set", "one", str(tmp_path), lambda: large).names) == list(large.names)
        assert "building that index again" in caplog.text
        assert file.read_bytes() == original  # and is deterministic


def test_a_cache_folder_that_cannot_be_written_costs_only_time(large: Index, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert cached("set", "one", str(tmp_path / "file"), lambda: large) is large


def test_an_unknown_home_folder_costs_only_time(
    large: Index, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    assert cached("set", "one", None, lambda: large) is large
    assert cached("set", "one", "~no such user/x", lambda: large) is large
    assert caplog.text.count("cannot keep the index of set: data.cache_dir: ") == 2


def test_a_folder_is_walked_again_only_when_an_entry_is_added_or_removed(
    image_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_CACHED_FROM", 1)
    data = Data(source="folder", path=str(image_set), cache_dir=str(tmp_path / "cache"))
    for folder in (image_set / "train", *(image_set / "train").iterdir()):
        os.utime(folder, ns=(1, 1))  # long ago: what has just changed is not trusted

    def names() -> list[str]:
        source = open_source(data, "train")
        return list(source.names)  # type: ignore[union-attr]

    before = names()
    walks: list[Path] = []
    walk: Callable[..., Index] = sys.modules["vit_dist.data.sets.formats.folder"]._walk  # type: ignore[attr-defined]
    monkeypatch.setattr("vit_dist.data.sets.formats.folder._walk", lambda *a: walks.append(a[0]) or walk(*a))
    assert names() == before and walks == []
    (image_set / "train/cat/0.png").rename(image_set / "train/cat/9.png")
    after = names()
    assert len(walks) == 1 and {*before} ^ {*after} == {"cat/0.png", "cat/9.png"}


@pytest.mark.slow
def test_an_index_of_1_200_000_files_is_read_in_seconds_and_within_a_gigabyte(tmp_path: Path) -> None:
    """1,000 class folders of 1,200 names each (hard links to few files: no other way is quick), walked once."""
    originals = [tmp_path / f"original{number}" for number in range(40)]
    for original in originals:
        original.write_bytes(b"x")
    for label in range(1000):
        folder = tmp_path / f"set/train/n{label:08}"
        folder.mkdir(parents=True)
        for number in range(1200):
            os.link(originals[(label * 1200 + number) % 40], folder / f"n{label:08}_{number}.JPEG")
        os.utime(folder, ns=(1, 1))
    os.utime(tmp_path / "set/train", ns=(1, 1))
    code = PEAK_BYTES + (
        "import sys, time\n"
        "begun = time.perf_counter()\n"
        "from vit_dist.config import Data\n"
        "from vit_dist.data.sets.sources import open_source\n"
        "from vit_dist.data.sets.examples import fingerprint\n"
        "source = open_source(Data(source='folder', path=sys.argv[1], cache_dir=sys.argv[2]), 'train')\n"
        "print(len(source), source.names[777_777], fingerprint(source), time.perf_counter() - begun, "
        "peak_bytes())\n"
    )
    outputs = []
    for _ in range(2):
        command = [sys.executable, "-c", code, str(tmp_path / "set"), str(tmp_path / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
        outputs.append(done.stdout.split())
    (first, second) = outputs
    print("built and read:", first, second)
    assert first[:3] == second[:3] and second[0] == "1200000"
    assert float(second[3]) < 10 and float(second[4]) < 1e9
    assert float(first[3]) > 2 * float(second[3])  # it was the walk that took the time

"""Locations: what is on a disk and what fsspec reaches are read alike."""

import os
import pickle
import threading
import uuid
from pathlib import Path

import pytest

from vit_dist.config import ConfigError
from vit_dist.data import files


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    text = str(tmp_path / "set") if request.param == "local" else f"memory://{uuid.uuid4().hex}/set"
    folder = files.location(text)
    for name in ("train/dog", "train/cat", "train/cat/empty"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "train/cat/b.jpg").write_bytes(b"0123456789")
    (folder / "train/cat/a.jpg").write_bytes(b"abc")
    return folder


def test_entries_are_sorted_and_tell_folders(place: Path) -> None:
    assert files.entries(place / "train") == [("cat", True), ("dog", True)]
    assert files.entries(place / "train/cat") == [("a.jpg", False), ("b.jpg", False), ("empty", True)]


def test_a_file_is_read_by_position_after_pickling_too(place: Path) -> None:
    file = files.open_file(place / "train/cat/b.jpg")
    for one in (file, pickle.loads(pickle.dumps(file))):
        assert one.read(2, 3) == b"234" and one.read(8, 10) == b"89" and one.read(0, 10) == b"0123456789"
    with files.open_stream(place / "train/cat/b.jpg") as stream:
        assert stream.seek(4) == 4 and stream.read(2) == b"45"


def test_a_stamp_changes_when_a_file_is_written_anew(place: Path) -> None:
    file = place / "train/cat/a.jpg"
    before = files.stamp(file)
    assert files.stamp(file) == before
    file.write_bytes(b"another")
    assert files.stamp(file) != before


def test_a_local_folders_stamp_changes_when_an_entry_comes_or_goes(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        os.utime(folder, ns=(1, 1))
    before = files.folders_stamp(folders)
    assert before is not None and files.folders_stamp(folders) == before
    (tmp_path / "b/new").touch()
    assert files.folders_stamp(folders) is None  # too fresh to be trusted
    os.utime(tmp_path / "b", ns=(1, 2))
    assert files.folders_stamp(folders) not in (None, before)


def test_many_threads_read_one_file_by_one_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)))
    file, wrong = files.open_file(path), []

    def read() -> None:
        wrong.extend(i for i in range(256) if file.read(i, 1) != bytes([i]))

    before = len(os.listdir("/proc/self/fd"))
    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(os.listdir("/proc/self/fd")) <= before + 1


@pytest.mark.parametrize(("text", "said"), [("gs://bucket/x", "gcsfs"), ("s3://bucket/x", "s3fs"), ("no://x", "no")])
def test_an_address_that_cannot_be_reached_names_what_is_missing(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"data.path: {text} cannot be reached .*{said}"):
        files.location(text)


def test_a_home_folder_is_written_out() -> None:
    assert files.location("~/images") == Path.home() / "images"

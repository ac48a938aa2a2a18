"""Files on a disk and files that fsspec reaches are read in the same way."""

import os
import pickle
import resource
import threading
import uuid
import weakref
from pathlib import Path

import pytest

from vit_dist.config import ConfigError
from vit_dist.data import files


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    text = str(tmp_path / "set") if request.param == "local" else f"memory://{uuid.uuid4().hex}/set"
    root = files.location(text)
    for name in ("train/dog", "train/cat", "train/cat/empty"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "train/cat/b.jpg").write_bytes(b"0123456789")
    (root / "train/cat/a.jpg").write_bytes(b"abc")
    return root


def test_entries_are_sorted_and_marked_as_folders_or_files(folder: Path) -> None:
    assert files.entries(folder / "train") == [("cat", True), ("dog", True)]
    assert files.entries(folder / "train/cat") == [("a.jpg", False), ("b.jpg", False), ("empty", True)]


def test_a_file_is_read_at_any_offset_and_after_pickling(folder: Path) -> None:
    file = files.open_file(folder / "train/cat/b.jpg")
    for copy in (file, pickle.loads(pickle.dumps(file))):
        assert copy.read(2, 3) == b"234" and copy.read(8, 10) == b"89" and copy.read(0, 10) == b"0123456789"
    with files.open_stream(folder / "train/cat/b.jpg") as stream:
        assert stream.seek(4) == 4 and stream.read(2) == b"45"


def test_a_stamp_changes_when_a_file_is_written_again(folder: Path) -> None:
    file = folder / "train/cat/a.jpg"
    before = files.stamp(file)
    assert files.stamp(file) == before
    file.write_bytes(b"another")
    assert files.stamp(file) != before


def test_a_local_folders_stamp_changes_when_an_entry_is_added(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("text", "plug_in"), [("gs://bucket/x", "gcsfs"), ("s3://bucket/x", "s3fs"), ("no://x", "no")])
def test_an_address_that_cannot_be_reached_names_what_is_missing(text: str, plug_in: str) -> None:
    with pytest.raises(ConfigError, match=f"data.path: {text} cannot be reached .*{plug_in}"):
        files.location(text)


def test_a_home_folder_is_expanded() -> None:
    assert files.location("~/images") == Path.home() / "images"
    with pytest.raises(ConfigError, match="data.path: ~no such user/images: cannot expand ~ to a home folder"):
        files.location("~no such user/images")


def test_addresses_of_local_files_are_paths() -> None:
    for scheme in ("file://", "local://"):
        assert files.location(f"{scheme}/data/a%20b") == Path("/data/a%20b")


def test_an_address_that_does_not_answer_is_an_error_of_the_config(tmp_path: Path) -> None:
    for text in ("ftp://localhost:1/images", f"zip://{tmp_path}/none.zip"):
        with pytest.raises(ConfigError, match=f"SOURCE: {text} cannot be reached .*check address") as caught:
            files.location(text, "SOURCE")
        assert "\n" not in str(caught.value)


def test_pipes_and_devices_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "file").write_bytes(b"abc")
    assert files.read_file(tmp_path / "file") == b"abc"
    for name in ("pipe", "zeros"):
        for read in (files.read_file, files.open_stream, lambda path: files.open_file(path).read(0, 1)):
            with pytest.raises(OSError, match="it is a pipe, device or folder"):
                read(tmp_path / name)


def test_open_files_of_all_living_holders_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Holder:
        pass

    limits = [(300, 1000)]
    monkeypatch.setattr(files, "_open_files", weakref.WeakKeyDictionary())
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, limit: limits.append(limit))
    first, second, third = Holder(), Holder(), Holder()
    files.allow_open_files([first], 40, "here")
    assert limits == [(300, 1000)]
    files.allow_open_files([first], 40, "here")  # the same files once more
    assert limits == [(300, 1000)]
    files.allow_open_files([second, third], 20, "here")
    assert limits == [(300, 1000), (80 + 256, 1000)]
    del first, second, third
    files.allow_open_files([Holder()], 80, "here")
    assert len(limits) == 2

    def refuse(_: int, limit: tuple[int, int]) -> None:
        raise ValueError(limit)

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(ConfigError, match=r"here: .*900 files .* may open 1000 only; .*ulimit -Hn 1156"):
        files.allow_open_files([Holder()], 900, "here")

"""Tars: read in place, local or remote, unpacked as late as possible, scanned once."""

import functools
import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from containers import add_file, assert_same, open_files

from vit_dist.config import ConfigError
from vit_dist.data.files import location
from vit_dist.data.sets import index
from vit_dist.data.sets.formats import archive
from vit_dist.data.sets.formats.archive import Member, MemoryLimit, Tar, members, open_tar, scan

_files = functools.partial(open_files, "tar")

SPLITS = ("train", "test")


def _upload(file: Path, folder: str) -> Path:
    remote = location(f"memory://{folder}/{file.name}")
    remote.parent.mkdir(parents=True, exist_ok=True)
    remote.write_bytes(file.read_bytes())
    return remote


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tars that were decompressed."""
    names: list[str] = []
    decompress = Tar._decompress

    def counted(tar: Tar, opener: Callable[..., object]) -> bytes:
        names.append(tar.path.name)
        return decompress(tar, opener)

    monkeypatch.setattr(Tar, "_decompress", counted)
    return names


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tars whose headers were read, each time they were."""
    names: list[str] = []

    def counted(tar: Tar) -> Iterator[Member]:
        names.append(tar.path.name)
        return scan(tar)

    monkeypatch.setattr("vit_dist.data.sets.formats.tar.scan", counted)
    return names


@pytest.mark.parametrize(("suffix", "mode"), [(".tar", "w"), (".tar.gz", "w:gz"), (".txz", "w:xz")])
def test_a_tar_behind_fsspec_is_the_folder(
    image_set: Path, pack: Callable[..., Path], tmp_path: Path, suffix: str, mode: str
) -> None:
    whole = _upload(pack(image_set, tmp_path / f"set{suffix}", "", mode), f"{tmp_path.name}-whole")
    for split in SPLITS:
        remote = _upload(pack(image_set / split, tmp_path / f"{split}{suffix}", "", mode), tmp_path.name)
        assert_same(_files(remote.parent, split), open_files("folder", image_set, split))
        assert_same(_files(whole, split), open_files("folder", image_set, split))
    source = _files(whole)
    assert_same(pickle.loads(pickle.dumps(source)), source)


def test_a_tar_is_scanned_once_and_then_its_index_is_read(
    image_set: Path, pack: Callable[..., Path], tmp_path: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_CACHED_FROM", 1)
    cache = str(tmp_path / "cache")
    file = pack(image_set, tmp_path / "set.tar")
    sources = [_files(file, split, cache_dir=cache) for split in SPLITS]
    assert scans == ["set.tar"]  # once for both splits
    del sources
    for split in SPLITS:
        assert_same(_files(file, split, cache_dir=cache), open_files("folder", image_set, split, cache_dir=cache))
    assert scans == ["set.tar"]
    pack(image_set / "train", file, "train")  # made anew
    assert len(_files(file, cache_dir=cache)) == 13 and scans == ["set.tar"] * 2


def test_a_compressed_tar_is_unpacked_when_an_image_is_wanted(
    image_set: Path, pack: Callable[..., Path], tmp_path: Path, unpacked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_CACHED_FROM", 1)
    cache = str(tmp_path / "cache")
    for split in SPLITS:
        pack(image_set / split, tmp_path / f"{split}.tar.gz", "", "w:gz")
        _files(tmp_path, split, cache_dir=cache)
    assert unpacked == ["train.tar.gz", "test.tar.gz"]  # to build the two indexes; train's classes came from its own
    unpacked.clear()
    test = _files(tmp_path, "test", cache_dir=cache)
    assert test.class_names == ("cat", "dog") and unpacked == []
    images = [test.read(i) for i in range(len(test))]
    assert images[3] == (image_set / "test" / "dog" / "0.png").read_bytes()
    assert unpacked == ["test.tar.gz"]


def test_a_tar_without_a_train_split_has_its_own_classes(
    image_set: Path, pack: Callable[..., Path], tmp_path: Path
) -> None:
    file = pack(image_set / "test", tmp_path / "set.tar", "val")
    assert _files(file, "test").class_names == ("cat", "dog") and _files(file, "test").split == "val"
    with pytest.raises(ConfigError, match="no split 'train' in it"):
        _files(file)


def test_a_compressed_tar_is_unpacked_once_while_a_source_holds_it(
    image_set: Path, pack: Callable[..., Path], tmp_path: Path, unpacked: list[str]
) -> None:
    file = pack(image_set, tmp_path / "set.tar.gz", "", "w:gz")
    train, test = _files(file), _files(file, "test")
    assert len(train) + len(test) == 20 and unpacked == ["set.tar.gz"]
    del train, test
    assert not [key for key in archive._open_tars if key[0] == str(file)]


def test_tars_share_one_limit_of_memory(image_set: Path, pack: Callable[..., Path], tmp_path: Path) -> None:
    files = [pack(image_set, tmp_path / f"{name}.tar.gz", "", "w:gz") for name in "ab"]
    size = len(pack(image_set, tmp_path / "plain.tar").read_bytes())
    memory = MemoryLimit(2 * size - 1, "do so")
    first, second = (open_tar(file, memory) for file in files)
    assert len(first.read(0, 2 * size)) == size
    with pytest.raises(ConfigError, match="b.tar.gz: .* more than data.memory_limit_gb=.*; raise it, or do so"):
        second.read(0, 1)


def test_a_damaged_compressed_tar_is_named_when_it_is_read(
    image_set: Path, pack: Callable[..., Path], tmp_path: Path
) -> None:
    file = pack(image_set, tmp_path / "a.tar.gz", "", "w:gz")
    file.write_bytes(file.read_bytes()[:-200])
    tar = open_tar(file, MemoryLimit(2**30, ""))
    for _ in range(2):
        with pytest.raises(ConfigError, match="a.tar.gz: cannot be read"):
            tar.read(0, 1)


def _inner(count: int, end_mark: bool = True) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for i in range(count):
            add_file(tar, f"{i}.png", bytes([i]) * 600)
    return content.getvalue() if end_mark else content.getvalue()[: count * (512 + 1024)]


@pytest.mark.parametrize("end_mark", [True, False])
def test_a_tar_inside_a_tar_ends_where_it_ends(tmp_path: Path, end_mark: bool) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, count in (("a.tar", 3), ("b.tar", 2)):
            add_file(tar, name, _inner(count, end_mark))
    found = []
    for outer in members(stream, "x"):
        for inner in members(stream, "x", outer.offset, outer.offset + outer.size):
            found.append((outer.name, inner.name))
            assert stream.getvalue()[inner.offset : inner.offset + inner.size] == bytes([int(inner.name[0])]) * 600
    assert found == [("a.tar", "0.png"), ("a.tar", "1.png"), ("a.tar", "2.png"), ("b.tar", "0.png"), ("b.tar", "1.png")]


def test_a_tar_cut_short_inside_a_tar_is_refused() -> None:
    content = _inner(2)
    with pytest.raises(ConfigError, match="x: member '1.png' is damaged"):
        list(members(io.BytesIO(content), "x", 0, 3 * 512 + 512 + 100))


def test_a_member_of_negative_size_is_refused() -> None:
    header = bytearray(_inner(1)[:512])
    header[124:136] = b"\xff" * 12  # -1 in base 256: following it would never end
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(ConfigError, match="x: "):
        list(members(io.BytesIO(bytes(header) + bytes(1024)), "x"))


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    header = bytearray(_inner(1)[:512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    with pytest.raises(ConfigError, match="'0.png' is a link, device or sparse file"):
        list(members(io.BytesIO(bytes(header) + bytes(4096)), "x"))

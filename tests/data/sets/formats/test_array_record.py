"""Prepared sets as a source: complete and readable by many threads, or an error that says what to do."""

import dataclasses
import functools
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from containers import assert_refused, open_files

from vit_dist.config import Data
from vit_dist.data.prepare.convert import prepare
from vit_dist.data.sets.formats.array_record import RecordImages, open_split
from vit_dist.data.sets.index import Names
from vit_dist.data.sets.manifest import read_manifest, write_manifest

_open = functools.partial(open_files, "array_record")
_fails = functools.partial(assert_refused, "array_record")


def _update_manifest(folder: Path, split: str, index: Path) -> None:
    """Makes the manifest list the index file with its present size."""
    manifest = read_manifest(folder)
    entry = dataclasses.replace(manifest.indexes[split], bytes=index.stat().st_size)
    write_manifest(folder, dataclasses.replace(manifest, indexes={**manifest.indexes, split: entry}))


@pytest.fixture
def records(image_set: Path, tmp_path: Path) -> Path:
    prepare(str(image_set), str(tmp_path / "records"), shards=4)
    return tmp_path / "records"


def test_a_source_is_read_by_many_threads_and_can_be_pickled(records: Path, image_set: Path) -> None:
    source = _open(records)
    assert source.split == "train" and _open(records, "val").split == "test"
    files = [(image_set / "train" / name).read_bytes() for name in source.names]
    copy = pickle.loads(pickle.dumps(source))
    order = np.random.default_rng(0).permutation(13 * 40) % 13
    for reader in (source, copy):
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(reader.read, order.tolist())) == [files[number] for number in order]


def test_shards_are_opened_when_they_are_read(records: Path) -> None:
    source = _open(records)
    (records / "train-00003-of-00004.array_record").unlink()
    assert source.read(0)
    with pytest.raises(OSError, match="train-00003-of-00004.array_record"):
        source.read(12)


def test_val_and_test_stand_for_each_other_and_other_splits_are_errors(records: Path) -> None:
    assert list(_open(records, "val").names) == list(_open(records, "test").names)
    _fails("no split 'extra' in .*records; found train, test", records, "extra")


def test_incomplete_sets_are_refused(records: Path, tmp_path: Path) -> None:
    file = records / "train-00002-of-00004.array_record"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    _fails(r"train-00002-of-00004.array_record: \d+ bytes, but the manifest says", records)
    file.unlink()
    _fails("train-00002-of-00004.array_record: missing", records)
    assert len(_open(records, "test")) == 7
    file.write_bytes(data)
    index = records / "train.index.npz"
    index.write_bytes(bytes(len(index.read_bytes())))
    _fails("train.index.npz: cannot be read", records)
    (records / "test.index.npz").rename(index)
    _fails("train.index.npz: .*manifest", records)
    _update_manifest(records, "train", index)
    _fails("train.index.npz: does not list the examples of this set", records)
    index.write_bytes(b"")
    _update_manifest(records, "train", index)
    _fails("train.index.npz: cannot be read", records)
    (records / "manifest.json").write_text("{")
    _fails("manifest.json: cannot be read", records, "test")
    (records / "manifest.json").write_text("{}")
    _fails("manifest.json: cannot be read", records, "test")
    (records / "manifest.json").unlink()
    _fails("no manifest.json in it; expected a folder that `vit-dist prepare` made", records)
    (records / "dataset_info.json").touch()
    _fails("set data.source=tfds", records)
    _fails("is a file", records / "dataset_info.json")


def test_a_damaged_record_is_an_unreadable_image_and_its_neighbours_are_not(records: Path) -> None:
    file = records / "train-00000-of-00004.array_record"
    intact = _open(records)
    images = [intact.read(number) for number in range(3)]
    data = bytearray(file.read_bytes())
    data[bytes(data).index(images[1]) + 20] ^= 1
    file.write_bytes(data)
    source = _open(records)
    assert source.read(0) == images[0] and source.read(2) == images[2]
    with pytest.raises(OSError, match="train-00000-of-00004.array_record is damaged .*mismatch") as caught:
        source.read(1)
    assert "\n" not in str(caught.value)


def test_more_shards_than_open_files_is_an_error_of_the_start(records: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (131, 131))
    _fails(r"records: \d+ files must be open at once, but this process may open 131", records)


def test_a_process_with_too_many_files_open_does_not_call_an_image_bad(records: Path) -> None:
    code = (
        "import os, resource, sys\n"
        "from vit_dist.config import ConfigError, Data\n"
        "from vit_dist.data.sets.sources import open_source\n"
        "source = open_source(Data(source='array_record', path=sys.argv[1]), 'train')\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "try:\n"
        "    while True: os.open('/dev/null', os.O_RDONLY)\n"
        "except OSError: pass\n"
        "try: source.read(0)\n"
        "except ConfigError as error: os.write(1, str(error).encode())\n"
    )
    command = [sys.executable, "-c", code, str(records)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[4])
    assert "train-00000-of-00004.array_record: Too many open files; raise the limit" in done.stdout


def test_a_remote_set_is_copied_into_the_cache_once(records: Path, tmp_path: Path, caplog: Any) -> None:
    remote = fsspec.filesystem("memory")
    remote.put(f"{records}/", f"/bucket-{tmp_path.name}/set/", recursive=True)
    address = f"memory://bucket-{tmp_path.name}/set"
    with caplog.at_level("INFO"):
        source = _open(address, cache_dir=str(tmp_path / "cache"))
    local = _open(records)
    assert [source.read(i) for i in range(13)] == [local.read(i) for i in range(13)]
    assert source.where == f"{address}/train" and "copying 4 shards" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO"):
        assert len(_open(address, cache_dir=str(tmp_path / "cache"))) == 13
    assert "copying" not in caplog.text
    (tmp_path / "file").touch()
    _fails("data.cache_dir: .* cannot be copied into", address, cache_dir=str(tmp_path / "file"))
    remote.rm(f"/bucket-{tmp_path.name}", recursive=True)


def test_names_that_are_no_utf8_come_back(image_set: Path, tmp_path: Path, encode: Callable[..., bytes]) -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    (image_set / "train" / "cat" / name).write_bytes(encode(99))
    prepare(str(image_set), str(tmp_path / "records"), shards=1)
    source = _open(tmp_path / "records")
    assert f"cat/{name}" in list(source.names)
    assert source.read(list(source.names).index(f"cat/{name}")) == encode(99)


def test_pickled_images_are_small(records: Path) -> None:
    source = open_split(records, "train", Data())
    for number in range(13):
        source.read(number)
    assert isinstance(source.images, RecordImages) and isinstance(source.names, Names)
    assert len(pickle.dumps(source.images)) < 2000

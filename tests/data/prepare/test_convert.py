"""`prepare`: records hold the source's examples, and a finished set is the same however it was made."""

import dataclasses
import fcntl
import hashlib
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import simplejpeg
from array_record.python.array_record_module import ArrayRecordReader

from vit_dist import cli
from vit_dist.config import ConfigError, Data
from vit_dist.data.pictures.images import decode
from vit_dist.data.prepare.convert import ImageOptions, merge, prepare, verify
from vit_dist.data.prepare.shards import measure
from vit_dist.data.sets import index, manifest
from vit_dist.data.sets.examples import ArraySource, FileSource, fingerprint
from vit_dist.data.sets.formats.array_record import Writer, pack
from vit_dist.data.sets.sources import open_source

REPOSITORY = Path(__file__).parents[3]


def _open(source: str, path: Path | None, split: str = "train", **keys: Any) -> Any:
    return open_source(Data(source=source, path=path and str(path), **keys), split)


def _examples(source: FileSource) -> list[tuple[str, int, bytes]]:
    return [(source.names[i], int(source.labels[i]), source.read(i)) for i in range(len(source))]


def _digests(folder: Path) -> dict[str, str]:
    """Every file below a folder, with the digest of its content."""
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _fails(message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(*map(str, arguments), **options)
    assert "\n" not in str(caught.value)


@pytest.fixture
def photos(tmp_path: Path, encode: Callable[..., bytes]) -> Path:
    """60 JPEG and PNG files of three classes, of sides 40 to 60, `val` beside `train`."""
    for number in range(60):
        split = "val" if number % 4 == 0 else "train"
        kind = ("JPEG", "jpg") if number % 2 else ("PNG", "png")
        file = tmp_path / "photos" / split / f"class {number % 3}" / f"{number:03}.{kind[1]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(number, (40 + number % 20, 60 - number % 20), kind[0]))
    return tmp_path / "photos"


def test_ids_names_labels_and_bytes_are_the_sources(photos: Path, tmp_path: Path) -> None:
    made = prepare(str(photos), str(tmp_path / "records"), shards=7)
    assert made["records"] == 60 and made["splits"] == {"train": 45, "val": 15} and made["classes"] == 3
    assert made["shards"] == 7 + 3 and made["bad"] is None  # none was decoded
    shards = sorted((tmp_path / "records").glob("*.array_record"))
    assert [file.name for file in shards][-1] == "val-00002-of-00003.array_record" and len(shards) == 10
    assert made["bytes"] == sum(file.stat().st_size for file in shards)
    for split in ("train", "val", "test"):
        source, records = _open("folder", photos, split), _open("array_record", tmp_path / "records", split)
        assert _examples(records) == _examples(source) and records.class_names == source.class_names
        assert records.labels.dtype == np.int32 and fingerprint(records) == fingerprint(source)


def test_a_shard_can_be_read_without_the_index(photos: Path, tmp_path: Path) -> None:
    prepare(str(photos), str(tmp_path / "records"), shards=7)
    reader = ArrayRecordReader(str(tmp_path / "records" / "train-00003-of-00007.array_record"))
    records = [msgpack.unpackb(record) for record in reader.read_all()]
    expected = _examples(_open("folder", photos))[3 * 45 // 7 : 4 * 45 // 7]
    assert [(record["name"], record["label"], record["image"]) for record in records] == expected


def test_resize_brings_the_short_side_down_and_never_up(photos: Path, tmp_path: Path) -> None:
    prepare(str(photos), str(tmp_path / "records"), images=ImageOptions(resize=50))
    source, records = _open("folder", photos), _open("array_record", tmp_path / "records")
    kept = 0
    for (_, _, before), (_, _, after) in zip(_examples(source), _examples(records), strict=True):
        old, new = decode(before, 3), decode(after, 3)
        assert after[:2] == b"\xff\xd8"
        if min(old.shape[:2]) <= 50:
            assert new.shape == old.shape
            if before[:2] == b"\xff\xd8":
                assert after == before
                kept += 1
        else:
            assert min(new.shape[:2]) == 50 and max(new.shape[:2]) == round(
                50 * max(old.shape[:2]) / min(old.shape[:2])
            )
        assert abs(float(new.mean()) - float(old.mean())) < 2
    assert kept
    assert records.version == "resize=50 encode=jpeg:90:420" and fingerprint(records) != fingerprint(source)


def test_raw_records_hold_the_decoded_pixels_and_gray_images_stay_gray(photos: Path, tmp_path: Path) -> None:
    gray = np.random.default_rng(0).integers(0, 256, (30, 20, 1), np.uint8)
    (photos / "train" / "class 0" / "gray.jpg").write_bytes(simplejpeg.encode_jpeg(gray, 90, "GRAY", "Gray"))
    prepare(str(photos), str(tmp_path / "records"), images=ImageOptions(encode="raw"), splits=["train"])
    source, records = _open("folder", photos), _open("array_record", tmp_path / "records")
    assert len(records) == 46
    for (name, _, before), (_, _, after) in zip(_examples(source), _examples(records), strict=True):
        pixels = decode(before, 3)
        height, width = pixels.shape[:2]
        if name.endswith("gray.jpg"):
            assert after == f"P5\n{width} {height}\n255\n".encode() + pixels[..., 0].tobytes()
            assert np.array_equal(decode(after, 1), decode(before, 1))
        else:
            assert after == f"P6\n{width} {height}\n255\n".encode() + pixels.tobytes()
        assert np.array_equal(decode(after, 3), pixels)


def test_an_unknown_encoding_is_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ImageOptions.encode: 'jpg' is none of jpeg, raw .did you mean jpeg"):
        prepare(str(photos), str(tmp_path / "records"), images=ImageOptions(encode="jpg"))


def test_sets_of_pixels_are_stored_raw_in_their_own_order(tmp_path: Path) -> None:
    made = prepare(None, str(tmp_path / "records"), kind="digits", shards=3)
    assert made["splits"] == {"train": 1437, "test": 360} and made["shards"] == 4
    for split in ("train", "test"):
        source, records = _open("digits", None, split), _open("array_record", tmp_path / "records", split)
        assert isinstance(source, ArraySource) and records.class_names == source.class_names
        assert np.array_equal(records.labels, source.labels)
        assert np.array_equal(np.stack([decode(records.read(i), 1) for i in range(len(records))]), source.images)
    assert records.names[1] == "5/0000001"


def test_a_prepared_set_can_be_prepared_again_into_other_shards(photos: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    prepare(str(photos), str(first), images=ImageOptions(resize=44), shards=5)
    made = prepare(str(first), str(second), shards=2)
    assert made["shards"] == 3 and made["splits"] == {"train": 45, "val": 15}
    before, after = _open("array_record", first), _open("array_record", second)
    assert _examples(after) == _examples(before) and fingerprint(after) == fingerprint(before)


def test_a_finished_set_is_left_alone_and_other_options_are_refused(photos: Path, tmp_path: Path) -> None:
    dest = tmp_path / "records"
    made = prepare(str(photos), str(dest), shards=4)
    before = {file: file.stat().st_mtime_ns for file in dest.iterdir()}
    assert prepare(str(photos), str(dest), shards=4) == made == verify(str(dest)) == merge(str(dest))
    assert {file: file.stat().st_mtime_ns for file in dest.iterdir()} == before
    message = "records: holds another set.*resize was None, now 9.*give another DEST"
    _fails(message, photos, dest, shards=4, images=ImageOptions(resize=9))
    _fails(r"splits.train.shards was 4, now 5", photos, dest, shards=5)
    (photos / "train" / "class 0" / "new.png").write_bytes((photos / "val" / "class 0" / "000.png").read_bytes())
    _fails("splits.train.records was 45, now 46", photos, dest, shards=4)


def test_a_folder_that_holds_anything_else_is_not_touched(photos: Path, tmp_path: Path) -> None:
    before = _digests(photos)
    _fails(r"photos: is not empty \(it holds train\)", photos, photos)
    file = photos / "val" / "class 0" / "000.png"
    _fails("000.png: is not a folder", photos, file)
    _fails("000.png: is not a folder", photos, file / "deep" / "er")
    _fails("gs://somewhere: records are written to a mounted disk", photos, "gs://somewhere")
    assert _digests(photos) == before


def test_files_of_others_in_the_folder_of_parts_are_not_touched(photos: Path, tmp_path: Path) -> None:
    kept = [tmp_path / "old" / "parts" / "thesis.txt", tmp_path / "alien" / manifest.WORK_FOLDER / "thesis.tmp"]
    for file in kept:
        file.parent.mkdir(parents=True)
        file.write_text("years")
    _fails(r"old: is not empty \(it holds parts\)", photos, tmp_path / "old")
    _fails("alien: is not empty .it holds .vit_dist_parts/thesis.tmp", photos, tmp_path / "alien")
    ours = tmp_path / "ours"
    (ours / manifest.WORK_FOLDER).mkdir(parents=True)
    (ours / manifest.WORK_FOLDER / ".plan.json.0123abc.tmp").touch()  # of a run that was killed before it had a plan
    (ours / "lost+found").mkdir()  # a disk of its own
    prepare(str(photos), str(ours), shards=2, shard_range=(0, 1))
    kept.append(ours / manifest.WORK_FOLDER / "thesis.txt")
    kept[-1].write_text("years")
    prepare(str(photos), str(ours), shards=2)
    assert all(file.read_text() == "years" for file in kept)
    assert list((ours / manifest.WORK_FOLDER).iterdir()) == [kept[-1]]


def test_a_finished_set_that_lost_a_file_is_not_called_finished(photos: Path, tmp_path: Path, caplog: Any) -> None:
    dest = tmp_path / "records"
    prepare(str(photos), str(dest), shards=3)
    with caplog.at_level("INFO"):
        prepare(str(photos), str(dest), shards=3)
    assert "records: already finished" in caplog.text
    (dest / "train-00001-of-00003.array_record").unlink()
    _fails("train-00001-of-00003.array_record: missing", photos, dest, shards=3)
    with pytest.raises(ConfigError, match="train-00001-of-00003.array_record: missing"):
        merge(str(dest))


@pytest.mark.parametrize("finished", [False, True])
def test_other_images_of_the_same_names_are_another_set(photos: Path, tmp_path: Path, finished: bool) -> None:
    dest = tmp_path / "records"
    prepare(str(photos), str(dest), shards=4, shard_range=(0, 4 if finished else 2))
    if finished:
        merge(str(dest))
    for split in ("train", "val"):
        for file in (photos / split).glob("*/*"):
            file.write_bytes(file.read_bytes() + b"changed")
    _fails(r"records: holds another set.*splits.train.sample was \w+, now \w+", photos, dest, shards=4)


def test_pixels_that_differ_are_another_set(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 6, 1), np.uint8)
    for shape in ((40, 4, 6), (40, 6, 4)):
        np.savez(tmp_path / "set.npz", x_train=images.reshape(shape), y_train=np.arange(40) % 2)
        if shape == (40, 4, 6):
            prepare(str(tmp_path / "set.npz"), str(tmp_path / "records"))
    _fails("splits.train.sample was", tmp_path / "set.npz", tmp_path / "records")


def test_another_quality_of_jpeg_is_another_set(photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    prepare(str(photos), str(tmp_path / "x"), images=ImageOptions(resize=40), shards=2, shard_range=(0, 1))
    monkeypatch.setattr("vit_dist.data.prepare.shards._JPEG_QUALITY", 75)
    message = "splits.train.version was resize=40 encode=jpeg:90:420, now resize=40 encode=jpeg:75:420"
    _fails(message, photos, tmp_path / "x", images=ImageOptions(resize=40), shards=2)


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_no_manifest_is_written_with_an_index_that_is_not_the_sets(photos: Path, tmp_path: Path, damage: str) -> None:
    dest = tmp_path / "records"
    prepare(str(photos), str(dest), shards=4, shard_range=(0, 4))
    file = dest / "train.index.npz"
    content = file.read_bytes()
    listed, _ = index.read(file)
    if damage == "other":  # of as many examples, of the same classes
        index.write(file, index.Index(listed.class_names, listed.names, listed.labels[::-1].copy()))
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(ConfigError, match=r"train.index.npz: (does not list the examples|cannot be read)"):
        merge(str(dest))
    assert not (dest / "manifest.json").exists()
    made = prepare(str(photos), str(dest), shards=4)
    assert file.read_bytes() == content and verify(str(dest)) == made


def test_verify_reads_the_index_even_if_the_manifest_has_its_digest(photos: Path, tmp_path: Path) -> None:
    dest = tmp_path / "records"
    prepare(str(photos), str(dest), shards=4)
    finished, file = manifest.read_manifest(dest), dest / "train.index.npz"
    file.write_bytes(file.read_bytes()[:300])
    size, digest = measure(file)
    indexes = {**finished.indexes, "train": manifest.Entry(file.name, 45, size, digest)}
    manifest.write_manifest(dest, dataclasses.replace(finished, indexes=indexes))
    with pytest.raises(ConfigError, match="train.index.npz: cannot be read"):
        verify(str(dest))


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "index", "swap", "manifest"])
def test_verify_names_the_file_that_was_changed(photos: Path, tmp_path: Path, damage: str) -> None:
    dest = tmp_path / "records"
    made = prepare(str(photos), str(dest), shards=3)
    assert verify(str(dest)) == made
    file = dest / ("train.index.npz" if damage == "index" else "train-00001-of-00003.array_record")
    data = bytearray(file.read_bytes())
    if damage in ("flip", "index"):
        data[len(data) // 2] ^= 1
    file.write_bytes(data[:-1] if damage == "cut" else data)
    if damage == "remove":
        file.unlink()
    if damage == "swap":
        shutil.copy(dest / "train-00000-of-00003.array_record", file)
    if damage == "manifest":
        file = dest / "manifest.json"
        file.write_text(file.read_text().replace('"records": 45', '"records": 46'))
    with pytest.raises(ConfigError, match=f"{file.name}: "):
        verify(str(dest))


def test_hosts_that_do_not_communicate_make_the_set_that_one_host_makes(photos: Path, tmp_path: Path) -> None:
    alone, together = tmp_path / "alone", tmp_path / "together"
    expected = prepare(str(photos), str(alone), shards=8)
    hosts = [tmp_path / "host 0", tmp_path / "host 1"]
    results = []
    for folder, shard_range in zip(hosts, ((0, 5), (5, 8)), strict=True):
        results.append(prepare(str(photos), str(folder), shards=8, shard_range=shard_range))
        assert prepare(str(photos), str(folder), shards=8, shard_range=shard_range) == results[-1]
        with pytest.raises(ConfigError, match="not finished"):
            _open("array_record", folder)
    assert [result["shards"] for result in results] == [5 + 2, 3 + 1]
    assert sum(result["records"] for result in results) == 60
    with pytest.raises(ConfigError, match="3 of 8 shards are not finished, the first is train-00005-of-00008"):
        merge(str(hosts[0]))
    for folder in hosts:
        shutil.copytree(folder, together, dirs_exist_ok=True)
    assert merge(str(together)) == expected and _digests(together) == _digests(alone)
    assert prepare(str(photos), str(together), shards=8, shard_range=(0, 5)) == results[0]


def test_shards_of_another_set_are_not_merged(photos: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    prepare(str(photos), str(ours), shards=4, shard_range=(0, 2))
    prepare(str(photos), str(theirs), shards=4, shard_range=(2, 4), images=ImageOptions(resize=40))
    (theirs / manifest.PLAN).unlink()
    shutil.copytree(theirs, ours, dirs_exist_ok=True)
    with pytest.raises(ConfigError, match=r"train-00002-of-00004.array_record.json: of another set"):
        merge(str(ours))


@pytest.mark.parametrize("text", ["{}", "{", '{"plan": 1}'])
def test_a_shards_entry_that_cannot_be_read_is_named(photos: Path, tmp_path: Path, text: str) -> None:
    prepare(str(photos), str(tmp_path / "x"), shards=2, shard_range=(0, 1))
    (tmp_path / "x" / manifest.WORK_FOLDER / "train-00000-of-00002.array_record.json").write_text(text)
    _fails("train-00000-of-00002.array_record.json: cannot be read", photos, tmp_path / "x", shards=2)


def test_a_plan_of_another_format_is_named(photos: Path, tmp_path: Path) -> None:
    prepare(str(photos), str(tmp_path / "x"), shards=2, shard_range=(0, 1))
    plan = tmp_path / "x" / manifest.PLAN
    plan.write_text(plan.read_text().replace("vit_dist records 2", "vit_dist records 1"))
    message = "plan.json: of the format 'vit_dist records 1', expected 'vit_dist records 2'; prepare the set again"
    _fails(message, photos, tmp_path / "x", shards=2)


@pytest.mark.parametrize("shard_range", [(0, 0), (3, 2), (0, 5), (4, 5)])
def test_a_range_outside_the_shards_is_refused(photos: Path, tmp_path: Path, shard_range: tuple[int, int]) -> None:
    _fails("expected A:B with 0 <= A < B <= 4", photos, tmp_path / "x", shards=4, shard_range=shard_range)


@pytest.mark.parametrize("hosts", [1, 2, 3, 7])
def test_ranges_that_cover_the_largest_split_cover_the_others_once(photos: Path, tmp_path: Path, hosts: int) -> None:
    for host in range(hosts):
        prepare(str(photos), str(tmp_path / "x"), shards=7, shard_range=(host * 7 // hosts, (host + 1) * 7 // hosts))
    assert merge(str(tmp_path / "x"))["records"] == 60


def test_the_number_of_shards_follows_from_the_counts(photos: Path, tmp_path: Path) -> None:
    assert prepare(str(photos), str(tmp_path / "a"))["shards"] == 16 + 6
    _fails("--shards=46: the largest split has 45 examples", photos, tmp_path / "b", shards=46)
    assert prepare(str(photos), str(tmp_path / "c"), shards=45)["shards"] == 60


def test_bad_images_are_an_error_or_are_kept_unchanged(photos: Path, tmp_path: Path, caplog: Any) -> None:
    bad = photos / "train" / "class 1" / "001.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    dest = tmp_path / "records"
    _fails(r"train/class 1/001.jpg: .*--on-bad=skip", photos, dest, images=ImageOptions(resize=40))
    with pytest.raises(ConfigError, match="not finished"):
        _open("array_record", dest)
    made = prepare(str(photos), str(dest), images=ImageOptions(resize=40, keep_bad=True))
    assert made["bad"] == 1 and made["records"] == 60 and "class 1/001.jpg" in caplog.text
    source, records = _open("folder", photos), _open("array_record", dest)
    number = list(source.names).index("class 1/001.jpg")
    assert records.read(number) == bad.read_bytes() and np.array_equal(records.labels, source.labels)
    untouched = prepare(str(photos), str(tmp_path / "untouched"), images=ImageOptions(keep_bad=True))
    assert untouched["bad"] is None  # none was decoded
    bad.unlink()
    bad.symlink_to("nowhere")  # nothing that could be kept
    _fails("class 1/001.jpg: cannot be read", photos, tmp_path / "unreadable", images=ImageOptions(40, keep_bad=True))


def test_a_missing_file_is_named(photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def fail(*_: Any) -> bytes:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr("vit_dist.data.sets.formats.folder.FolderImages.read", fail)
    _fails("class 0/.*cannot be read", photos, tmp_path / "x", splits=["train"])


def test_files_of_dead_runs_are_removed_and_those_of_a_live_run_are_not(photos: Path, tmp_path: Path) -> None:
    dest = tmp_path / "records"
    prepare(str(photos), str(dest), shards=2, shard_range=(0, 1))
    dead, live, other = (
        dest / manifest.WORK_FOLDER / f"train-0000{n}-of-00002.array_record.abc.tmp" for n in (0, 1, 7)
    )
    for file in (dead, live, other):
        file.write_bytes(b"unfinished")
    with live.open("rb") as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        prepare(str(photos), str(dest), shards=2, shard_range=(0, 2))
        assert not dead.exists() and live.exists() and other.exists()
    merge(str(dest))
    assert sorted(file.suffix for file in dest.iterdir()) == [".array_record"] * 3 + [".json", ".npz", ".npz"]


def test_val_and_test_are_two_splits_unless_they_have_the_same_images(image_set: Path, tmp_path: Path) -> None:
    assert prepare(str(image_set), str(tmp_path / "a"))["splits"] == {"train": 13, "test": 7}
    shutil.copytree(image_set / "test", image_set / "val")
    for name, other in (("cat/0.png", "cat/2.png"), ("cat/2.png", "cat/0.png")):
        shutil.copy(image_set / "test" / name, image_set / "val" / other)
    assert prepare(str(image_set), str(tmp_path / "b"))["splits"] == {"train": 13, "test": 7, "val": 7}
    shutil.rmtree(image_set / "train")
    assert prepare(str(image_set), str(tmp_path / "c"))["splits"] == {"test": 7, "val": 7}
    assert prepare(str(image_set), str(tmp_path / "d"), splits=["val"])["splits"] == {"val": 7}


def test_a_source_is_recognised_by_its_files(
    image_set: Path, pack: Callable[..., Path], tmp_path: Path, encode: Callable[..., bytes]
) -> None:
    pack(image_set, tmp_path / "all.tar", "images")
    (tmp_path / "tars").mkdir()
    for split in ("train", "test"):
        pack(image_set / split, tmp_path / "tars" / f"{split}.tar.gz", mode="w:gz")
    results = [
        prepare(str(source), str(tmp_path / f"from {source.name}"), shards=2)
        for source in (image_set, tmp_path / "all.tar", tmp_path / "tars")
    ]
    assert results[0] == results[1] == results[2]


# The command


def _command(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vit_dist", "prepare", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, **options)


def test_the_command_prints_one_object_and_the_same_when_run_again(photos: Path, tmp_path: Path, capsys: Any) -> None:
    dest = str(tmp_path / "records")

    def printed(*words: str) -> dict[str, Any]:
        assert cli.main(["prepare", *words]) == 0
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        return json.loads(out)

    made = printed(str(photos), dest, "--resize=40", "--shards=3", "--workers=2")
    assert list(made) == ["records", "shards", "bytes", "digest", "splits", "classes", "bad"]
    assert printed(str(photos), dest, "--resize=40", "--shards=3") == made
    assert printed("--verify", dest) == made and printed("--merge", dest) == made
    digits = printed("--source=digits", str(tmp_path / "digits"), "--split=test", "--config.data.memory_limit_gb=1")
    assert digits["records"] == 360
    assert printed(str(photos), str(tmp_path / "range"), "--shards=3", "--shard-range=0:1")["shards"] == 2


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--verify", "A", "--resize=3"], "prepare --verify: takes DEST alone, found --resize"),
        (["--merge", "A", "--workers=3"], "prepare --merge: takes DEST alone, found --workers"),
        (["digits", "B", "--source=digits"], "data.path"),
        (["--merge", "A", "B"], "prepare --merge: takes DEST alone, found more than one path"),
        (["A", "B", "C"], "prepare: expected SOURCE and DEST, found 3 paths"),
        (["A"], "no SOURCE is given"),
        (["A", "B", "--source=tra"], "'tra' is none of"),
        (["A", "B", "--source=tar"], "data.path: no such file or folder: A"),
        (
            ["A", "B", "--config.data.flip=True"],
            "prepare --config.data.flip: has no effect here; only data",
        ),
        (["--verify", "nowhere"], "nowhere: no manifest.json in it"),
    ],
)
def test_wrong_arguments_are_one_line(
    words: list[str], line: str, capsys: Any, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and line in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_options_may_stand_between_source_and_dest(photos: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["prepare", str(photos), "--resize=40", str(tmp_path / "x"), "--shards=3"]) == 0
    assert json.loads(capsys.readouterr().out)["shards"] == 4
    assert manifest.read_manifest(tmp_path / "x").plan.resize == 40
    with pytest.raises(SystemExit) as stopped:
        cli.main(["prepare", str(photos), "--resise=40", str(tmp_path / "x")])
    line = "error: unrecognized arguments: --resise=40; see vit-dist prepare --help\n"
    assert stopped.value.code == 2 and capsys.readouterr().err == line


@pytest.mark.parametrize("words", ["--resize=0", "--shards=x", "--shard-range=3", "--encode=png"])
def test_ill_typed_options_are_one_line(words: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["prepare", "A", "B", words])
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: argument --")


def test_the_command_needs_no_jax(photos: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; from vit_dist.cli import main; code = main(['prepare', {str(photos)!r}, {str(tmp_path / 'x')!r}])"
        "; assert code == 0; print([name for name in ('jax', 'grain', 'tensorflow', 'pyarrow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "Traceback" not in done.stderr


def test_a_full_disk_is_one_line_and_no_set(photos: Path, tmp_path: Path) -> None:
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # no file may be longer: a shard is 64 KiB at least

    done = _command(photos, tmp_path / "x", preexec_fn=no_room)
    assert done.returncode == 2 and done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if "recognised as" not in line]
    assert len(errors) == 1 and errors[0].startswith("error: ") and "File too large" in errors[0]
    assert not list((tmp_path / "x").rglob("*.tmp")) and not list((tmp_path / "x").rglob("*.array_record"))
    assert _command(photos, tmp_path / "x").returncode == 0


def test_the_writers_error_holds_the_disks_message() -> None:
    with pytest.raises(ConfigError, match=r"shown: cannot be written \(.*No space left on device"):
        writer = Writer(Path("/dev/full"), Path("shown"))
        for number in range(100):
            writer.write(pack(bytes(100_000), number, "name"))
        writer.close()


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_runs_killed_while_they_write_shards_and_run_again_make_the_same_set(
    tmp_path: Path, encode: Callable[..., bytes], kills: int
) -> None:
    source, dest = tmp_path / "source", tmp_path / "records"
    for number in range(60):
        file = source / ("train" if number % 3 else "test") / f"class {number % 2}" / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(number, (420, 360), "PNG"))
        for copy in range(2 * kills):
            shutil.copy(file, file.with_name(f"{number:03}-{copy}.png"))
    options = ["--resize=128", "--shards=80", "--workers=2"]
    moments, kills_in_a_shard, finished = random.Random(0), 0, 0
    for _ in range(kills):
        command = [sys.executable, "-m", "vit_dist", "prepare", str(source), str(dest), *options]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=REPOSITORY) as process:
            deadline = time.monotonic() + 60
            while process.poll() is None and len(list(dest.glob(f"{manifest.WORK_FOLDER}/train*.json"))) <= finished:
                assert time.monotonic() < deadline
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
        kills_in_a_shard += not (dest / "manifest.json").exists() and bool(
            list(dest.glob(f"{manifest.WORK_FOLDER}/*.tmp"))
        )
        before, finished = finished, len(list(dest.glob(f"{manifest.WORK_FOLDER}/train*.json")))
        assert finished >= before  # finished shards stay
        if not (dest / "manifest.json").exists():
            with pytest.raises(ConfigError, match="not finished"):
                _open("array_record", dest)
    assert kills_in_a_shard >= kills // 2 + 1 and 0 < finished < 80
    done = _command(source, dest, *options, check=True)
    assert "going on, " in done.stderr
    undisturbed = _command(source, tmp_path / "undisturbed", *options, check=True)
    assert done.stdout == undisturbed.stdout and _digests(dest) == _digests(tmp_path / "undisturbed")
    assert json.loads(_command("--verify", dest, check=True).stdout) == json.loads(done.stdout)


def test_cifar10_is_the_same_from_records_as_from_its_tar(shared: Path, tmp_path: Path) -> None:
    data = Data(cache_dir=str(tmp_path / "cache"))
    made = prepare(str(shared / "cifar10"), str(tmp_path / "records"), splits=["test"], kind="tar", data=data)
    assert made["records"] == 10_000 and made["classes"] == 10
    source = _open("tar", shared / "cifar10", "test", cache_dir=str(tmp_path / "cache"))
    records = _open("array_record", tmp_path / "records", "test")
    assert np.array_equal(records.labels, source.labels) and np.bincount(records.labels).tolist() == [1000] * 10
    assert list(records.names) == list(source.names)
    for i in range(10_000):
        assert records.read(i) == source.read(i)
    chosen = range(0, 10_000, 97)
    raw = prepare(str(tmp_path / "records"), str(tmp_path / "raw"), images=ImageOptions(encode="raw"), data=data)
    assert raw["records"] == 10_000
    pixels = _open("array_record", tmp_path / "raw", "test")
    assert all(np.array_equal(decode(pixels.read(i), 3), decode(source.read(i), 3)) for i in chosen)
    assert index.read(tmp_path / "raw" / "test.index.npz")[0].class_names == source.class_names

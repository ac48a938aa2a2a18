"""TFDS: sets that tensorflow-datasets itself prepares, without TensorFlow, read as the class folder they came from."""

import functools
import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from containers import assert_refused, open_files

from vit_dist.data.sets.examples import fingerprint

tfds = pytest.importorskip("tensorflow_datasets")

CLASSES = ("cat", "dog")
_fails = functools.partial(assert_refused, "tfds")


def _features(**more: Any) -> dict[str, Any]:
    return {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=CLASSES), **more}


def _prepare(data_dir: Path, image_set: Path, features: dict[str, Any], **info: Any) -> Path:
    """The image set as the data set `pets` in version 1.0.0: its folder. `label` -1 hides the test split's labels."""
    hidden = info.pop("hidden", False)

    class Pets(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[misc, call-arg]
        __module__ = "pets"  # in a dotted module TFDS looks for files beside the code, by a library it does not require
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> Any:
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features), **info)

        def _split_generators(self, _: Any) -> dict[str, Any]:
            return {split: self._generate_examples(image_set / split) for split in ("train", "test")}

        def _generate_examples(self, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
            for file in sorted(folder.glob("*/*")):
                values = {
                    "image": io.BytesIO(file.read_bytes()),
                    "label": -1 if hidden and folder.name == "test" else file.parent.name,
                    "file_name": f"{folder.name}/{file.name}",
                    "species": file.parent.name,
                }
                yield f"{file.parent.name}/{file.name}", {name: values[name] for name in features}

    builder = Pets(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return data_dir / "pets" / "1.0.0"


@pytest.fixture
def pets(tmp_path: Path, image_set: Path) -> Path:
    return _prepare(tmp_path / "tfds", image_set, _features(file_name=tfds.features.Text()))


def test_ids_labels_and_bytes_are_those_of_the_class_folder(pets: Path, image_set: Path) -> None:
    assert len(list(pets.glob("pets-train.array_record-*-of-00002"))) == 2
    for split in ("train", "test", "val"):
        folder, source = open_files("folder", image_set, split), open_files("tfds", pets, split)
        assert len(source) == len(folder) and source.class_names == CLASSES
        assert list(source.names) == list(folder.names)
        assert source.labels.dtype == np.int32 and np.array_equal(source.labels, folder.labels)
        assert [source.read(i) for i in range(len(source))] == [folder.read(i) for i in range(len(folder))]
        assert fingerprint(source) == fingerprint(folder)


def test_a_set_is_found_by_name_and_version_and_in_the_folders_above(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fingerprint(open_files("tfds", pets))
    assert fingerprint(open_files("tfds", pets.parent)) == expected
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(pets.parent.parent))
    for name in ("pets", "pets:1.0.0"):
        assert fingerprint(open_files("tfds", name)) == expected
    _fails("no folder 'pets:2.0.0', and no prepared data set of that name .*download_and_prepare", "pets:2.0.0")
    _fails("no folder 'no_such_set'", "no_such_set")
    _fails("no folder 'not a name!'", "not a name!")


def test_a_source_is_read_by_many_threads_and_can_be_pickled(pets: Path) -> None:
    source = open_files("tfds", pets)
    expected = [source.read(i) for i in range(13)]
    copy = pickle.loads(pickle.dumps(source))
    order = np.random.default_rng(0).integers(0, 13, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(copy.read, order)) == [expected[i] for i in order]


def test_records_without_a_name_are_named_by_their_number(tmp_path: Path, image_set: Path) -> None:
    source = open_files("tfds", _prepare(tmp_path / "tfds", image_set, _features()))
    folder = open_files("folder", image_set)
    assert source.labels.tolist() == folder.labels.tolist()
    assert sorted(name.partition("/")[2] for name in source.names) == [f"{number:08}" for number in range(13)]
    names = list(source.names)
    assert all(names[ids] == sorted(names[ids]) for ids in (slice(0, 5), slice(5, 13)))
    for classes in (slice(0, 5), slice(5, 13)):  # TFDS shuffles; within a class the order is its own
        numbers = range(13)[classes]
        assert {source.read(i) for i in numbers} == {folder.read(i) for i in numbers}


def test_of_two_labels_the_supervised_one_is_taken(tmp_path: Path, image_set: Path) -> None:
    features = _features(species=tfds.features.ClassLabel(names=("dog", "cat")))
    chosen = _prepare(tmp_path / "one", image_set, features, supervised_keys=("image", "species"))
    assert (
        open_files("tfds", chosen).class_names == ("dog", "cat")
        and open_files("tfds", chosen).labels.tolist()[:8] == [0] * 8
    )
    _fails(
        "pets/1.0.0 has no single ClassLabel to train on; its features are .*label",
        _prepare(tmp_path / "two", image_set, features),
    )


def test_sets_of_another_format_are_refused_with_what_to_do(pets: Path) -> None:
    info = pets / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    _fails('prepared as tfrecord, which cannot be .*file_format="array_record"', pets)


def test_hidden_labels_are_refused(tmp_path: Path, image_set: Path) -> None:
    pets = _prepare(tmp_path / "tfds", image_set, _features(), hidden=True)
    assert len(open_files("tfds", pets)) == 13
    _fails("record 0 has label -1, expected 0..1; the labels of this split are hidden", pets, "test")


def test_what_is_missing_or_damaged_is_named(pets: Path, tmp_path: Path) -> None:
    _fails("pets/1.0.0 has no split 'extra', but t", pets, "extra")
    (tmp_path / "empty").mkdir()
    _fails("no dataset_info.json in .*empty", tmp_path / "empty")
    shard = next(pets.glob("pets-train.array_record-*"))
    whole = shard.read_bytes()
    source = open_files("tfds", pets)
    start = whole.index(b"\x89PNG")
    shard.write_bytes(whole[:start] + b"\xff" * 500 + whole[start + 500 :])
    _fails("1.0.0/train, record .* cannot be read .*prepare the data set again", pets)
    with pytest.raises(OSError, match="record .* cannot be read"):
        [source.read(i) for i in range(13)]
    shard.write_bytes(whole[:100])
    _fails("1.0.0/train, record .* cannot be read", pets)
    shard.unlink()
    _fails("pets-train.array_record-.*: a shard of pets/1.0.0 that is missing", pets)
    (pets / "dataset_info.json").write_text("{")
    _fails("dataset_info.json: cannot be read", pets)


def test_one_of_two_versions_in_a_folder_must_be_named(pets: Path) -> None:
    other = pets.parent / "1.1.0"
    other.mkdir()
    (other / "dataset_info.json").write_bytes((pets / "dataset_info.json").read_bytes())
    _fails(r"holds 2 data sets \(1.0.0, 1.1.0\); name one of them", pets.parent)


def test_reading_imports_neither_tensorflow_nor_jax(pets: Path) -> None:
    code = f"""
import sys
from vit_dist.config import Data
from vit_dist.data.sets.sources import open_source
source = open_source(Data(source="tfds", path={str(pets)!r}), "train")
assert len(source.read(0)) > 100
print(sorted({{"tensorflow", "jax", "torch"}} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[4])
    assert run.stdout == "[]\n", run.stderr

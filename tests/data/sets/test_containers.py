"""CIFAR-10's test split through four containers: the same ids, labels, bytes, and pixels of a training stream."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from vit_dist.config import Data
from vit_dist.data.prepare.convert import prepare
from vit_dist.data.sets.examples import FileSource, fingerprint
from vit_dist.data.sets.sources import open_source
from vit_dist.data.stream.loader import train_batches

pytestmark = pytest.mark.slow  # the tests of each format have small sets

AUGMENTED = Data(crop_area=(0.3, 1.0), flip=True, color_jitter=0.3, randaugment_layers=2)
BATCH = 500


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileSource]:

    packed = Path(__file__).parents[4] / "shared/data/cifar10/test.tar.gz"
    if not packed.exists():
        pytest.skip(f"{packed} is not here")
    place = tmp_path_factory.mktemp("cifar10")

    def opened(source: str, path: Path) -> FileSource:
        found = open_source(Data(source=source, path=str(path), cache_dir=str(place / "cache")), "test")
        assert isinstance(found, FileSource)
        return found

    with tarfile.open(packed) as tar:
        tar.extractall(place / "folder", filter="data")
    found = {"tar": opened("tar", packed.parent), "folder": opened("folder", place / "folder")}
    prepare(str(place / "folder"), str(place / "records"), data=Data(cache_dir=str(place / "cache")))
    found["array_record"] = opened("array_record", place / "records")

    images = found["folder"]
    order = np.random.default_rng(0).permutation(len(images))  # a Parquet file need not lie in the order of ids
    names = pyarrow.array([images.names[i] for i in order])
    encoded = pyarrow.array([images.read(i) for i in order])
    features = {"label": {"_type": "ClassLabel", "names": list(images.class_names)}}
    table = pyarrow.table(
        {
            "image": pyarrow.StructArray.from_arrays([encoded, names], ["bytes", "path"]),
            "label": pyarrow.array(images.labels[order].astype(np.int64)),
        }
    ).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    (place / "parquet").mkdir()
    parquet.write_table(table, place / "parquet/test-00000-of-00001.parquet", row_group_size=100)
    found["parquet"] = opened("parquet", place / "parquet")
    return found


def stream(source: FileSource) -> list[dict[str, np.ndarray]]:
    """Two epochs and a bit, of every seventh part of each batch."""
    rows = range(BATCH // 7)
    return list(
        train_batches(
            source, AUGMENTED, image_size=(32, 32), channels=3, seed=0, batch_size=BATCH, rows=rows, start_step=0,
            stop_step=2 * len(source) // BATCH + 1,
        )
    )  # fmt: skip


def test_every_container_has_the_same_ids_labels_and_bytes(containers: dict[str, FileSource]) -> None:
    expected = containers["folder"]
    assert len(expected) == 10_000 and expected.labels.tolist() == [i // 1000 for i in range(10_000)]
    encoded = [expected.read(i) for i in range(10_000)]
    for source in containers.values():
        assert list(source.names) == list(expected.names) and np.array_equal(source.labels, expected.labels)
        assert source.class_names == expected.class_names
        assert all(source.read(i) == encoded[i] for i in range(10_000))
        assert fingerprint(source) == fingerprint(expected)


def test_every_container_makes_the_same_stream_of_pixels(containers: dict[str, FileSource]) -> None:
    streams = {name: stream(source) for name, source in containers.items()}
    for step, expected in enumerate(streams["folder"]):
        for found in streams.values():
            assert all(np.array_equal(found[step][name], expected[name]) for name in ("id", "label", "image"))
    assert len(streams["folder"]) == 41

"""CIFAR-10's test split through four containers: the same ids, labels, bytes, and pixels of a training stream."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from containers import open_files
from pyarrow import parquet

from vit_dist.config import Data
from vit_dist.data.prepare.convert import prepare
from vit_dist.data.sets.examples import FileSource, fingerprint
from vit_dist.data.stream.loader import train_batches

pytestmark = pytest.mark.slow  # the tests of each format have small sets

AUGMENTED = Data(crop_area=(0.3, 1.0), flip=True, color_jitter=0.3, randaugment_layers=2)
BATCH = 500


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileSource]:
    packed = Path(__file__).parents[4] / "shared/data/cifar10/test.tar.gz"
    if not packed.exists():
        pytest.skip(f"{packed} is not here")
    root = tmp_path_factory.mktemp("cifar10")

    def opened(name: str, path: Path) -> FileSource:
        return open_files(name, path, "test", cache_dir=str(root / "cache"))

    with tarfile.open(packed) as tar:
        tar.extractall(root / "folder", **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    sources = {"tar": opened("tar", packed.parent), "folder": opened("folder", root / "folder")}
    prepare(str(root / "folder"), str(root / "records"), data=Data(cache_dir=str(root / "cache")))
    sources["array_record"] = opened("array_record", root / "records")

    images = sources["folder"]
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
    (root / "parquet").mkdir()
    parquet.write_table(table, root / "parquet/test-00000-of-00001.parquet", row_group_size=100)
    sources["parquet"] = opened("parquet", root / "parquet")
    return sources


def stream(source: FileSource) -> list[dict[str, np.ndarray]]:
    """Two epochs and a bit, of the first seventh of each batch."""
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
        for batches in streams.values():
            assert all(np.array_equal(batches[step][name], expected[name]) for name in ("id", "label", "image"))
    assert len(streams["folder"]) == 41

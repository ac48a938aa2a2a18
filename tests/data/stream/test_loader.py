"""Batches are pure functions of seed, step and rows."""

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vit_dist.config import ConfigError, Data
from vit_dist.data.pictures.crop_modes import CropMode, fit
from vit_dist.data.pictures.images import decode, resize
from vit_dist.data.sets.examples import ArraySource, Source
from vit_dist.data.sets.sources import open_source
from vit_dist.data.shuffle import example_ids
from vit_dist.data.stream.loader import BadExample, Batches, HostBatch, evaluation_batches, train_batches

SIZE = (8, 6)
AUGMENTED = Data(source="folder", crop_area=(0.3, 1.0), flip=True, threads=2)


@pytest.fixture
def source(image_set: Path) -> Source:
    return _open(image_set)


def _open(image_set: Path, split: str = "train") -> Source:
    return open_source(Data(source="folder", path=str(image_set)), split)


def _array(count: int, shape: tuple[int, int, int] = (4, 4, 1)) -> ArraySource:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *shape), np.uint8)
    return ArraySource(images, rng.integers(0, 10, count).astype(np.int32), tuple("0123456789"))


def _train(source: Source, data: Data = AUGMENTED, **changes: Any) -> Batches:
    keys: dict[str, Any] = {
        "image_size": SIZE,
        "channels": 3,
        "seed": 1,
        "batch_size": 8,
        "rows": range(8),
        "start_step": 0,
        "stop_step": 5,
    }
    return train_batches(source, data, **{**keys, **changes})


def _evaluate(source: Source, data: Data = AUGMENTED, **changes: Any) -> Batches:
    keys: dict[str, Any] = {"image_size": SIZE, "channels": 3, "batch_size": 5, "rows": range(5)}
    return evaluation_batches(source, data, **{**keys, **changes})


def _assert_same(batches: list[HostBatch], others: list[HostBatch]) -> None:
    assert len(batches) == len(others)
    for a, b in zip(batches, others, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert np.array_equal(a[key], b[key]) and a[key].dtype == b[key].dtype, key


def _join(hosts: list[list[HostBatch]]) -> list[HostBatch]:
    return [
        {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        for batches in zip(*hosts, strict=True)
    ]


def test_a_batch_has_the_ids_of_its_positions(source: Source) -> None:
    batches = list(_train(source))
    assert len(batches) == 5
    for step, batch in enumerate(batches):
        assert batch["image"].shape == (8, *SIZE, 3) and batch["image"].dtype == np.uint8
        assert batch["label"].dtype == batch["id"].dtype == np.int32
        assert np.array_equal(batch["id"], example_ids(1, 13, step * 8 + np.arange(8)))
        assert np.array_equal(batch["label"], source.labels[batch["id"]])
    ids = np.concatenate([batch["id"] for batch in batches])
    for epoch in range(3):  # 13 examples in batches of 8
        assert sorted(ids[epoch * 13 : (epoch + 1) * 13]) == list(range(13))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_that_share_the_rows_see_one_stream(source: Source, hosts: int) -> None:
    rows = 8 // hosts
    batches = [list(_train(source, rows=range(host * rows, (host + 1) * rows))) for host in range(hosts)]
    _assert_same(_join(batches), list(_train(source)))
    array = _array(13)
    batches = [list(_train(array, channels=1, rows=range(h * rows, (h + 1) * rows))) for h in range(hosts)]
    _assert_same(_join(batches), list(_train(array, channels=1)))


def test_threads_do_not_change_the_stream(source: Source) -> None:
    alone = list(_train(source, dataclasses.replace(AUGMENTED, threads=1)))
    _assert_same(list(_train(source, dataclasses.replace(AUGMENTED, threads=5))), alone)


def test_worker_processes_do_not_change_the_stream(image_set: Path, pack: Callable[..., Path], tmp_path: Path) -> None:
    packed = open_source(Data(source="tar", path=str(pack(image_set, tmp_path / "a.tar.gz", "", "w:gz"))), "train")
    batches = _train(packed, dataclasses.replace(AUGMENTED, workers=2))
    _assert_same(
        [{key: np.array(value) for key, value in batch.items()} for batch in batches], list(_train(_open(image_set)))
    )
    assert not multiprocessing.active_children()


def test_a_start_in_the_middle_of_an_epoch_continues_the_stream(source: Source) -> None:
    stream = list(_train(source))
    _assert_same(list(_train(source, start_step=2)), stream[2:])
    _assert_same(list(_train(source, start_step=4, stop_step=5)), stream[4:])
    assert list(_train(source, start_step=5)) == []


def test_seeds_differ_in_order_and_in_crops(source: Source) -> None:
    batch, other = next(_train(source, seed=1)), next(_train(source, seed=2))
    assert not np.array_equal(batch["id"], other["id"])
    epochs = list(_train(source, seed=1, batch_size=13, rows=range(13)))[:2]
    first_images, second_images = (epoch["image"][np.argsort(epoch["id"])] for epoch in epochs)
    differ = [not np.array_equal(a, b) for a, b in zip(first_images, second_images, strict=True)]
    assert sum(differ) >= 12  # each image is cropped anew in each epoch


def test_without_augmentation_files_are_only_resized(source: Source) -> None:
    batch = next(_train(source, Data()))
    for image, index in zip(batch["image"], batch["id"], strict=True):
        assert np.array_equal(image, resize(decode(source.read(int(index)), 3), SIZE))  # type: ignore[union-attr]


def test_flips_alone_keep_the_whole_image(source: Source) -> None:
    plain = list(_train(source, Data()))
    flipped = list(_train(source, Data(flip=True)))
    count = 0
    for batch, flipped_batch in zip(plain, flipped, strict=True):
        for a, b in zip(batch["image"], flipped_batch["image"], strict=True):
            assert np.array_equal(a, b) or np.array_equal(a[:, ::-1], b)
            count += not np.array_equal(a, b)
    assert 10 < count < 30  # of 40


def test_pixels_in_memory_keep_their_size_and_values() -> None:
    source = _array(50, (7, 9, 3))
    for batch in _train(source, AUGMENTED):
        assert np.array_equal(batch["image"], source.images[batch["id"]])


def test_channels_are_converted_or_refused(source: Source) -> None:
    assert next(_train(source, channels=1))["image"].shape == (8, *SIZE, 1)
    gray, colour = _array(9), _array(9, (4, 4, 3))
    assert np.array_equal(next(_train(gray, channels=3))["image"][..., 2:], next(_train(gray, channels=1))["image"])
    assert next(_train(colour, channels=1))["image"].shape == (8, 4, 4, 1)
    with pytest.raises(ConfigError, match="model.channels: 4, but the images of this source have 3"):
        _train(colour, channels=4)
    with pytest.raises(ConfigError, match="model.channels: 4, but image files are decoded to 1 or 3"):
        _train(source, channels=4)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 7, 13, 64])
def test_evaluation_counts_every_example_once(source: Source, batch_size: int) -> None:
    for examples in (source, _array(13, (4, 4, 3))):
        batches = list(_evaluate(examples, batch_size=batch_size, rows=range(batch_size)))
        assert len(batches) == -(-13 // batch_size)
        assert all(len(batch["mask"]) == batch_size for batch in batches)
        mask = np.concatenate([batch["mask"] for batch in batches])
        assert mask.dtype == bool and mask.sum() == 13
        assert np.concatenate([batch["id"] for batch in batches])[mask].tolist() == list(range(13))
        assert np.array_equal(np.concatenate([batch["label"] for batch in batches])[mask], examples.labels)
        for batch in batches:
            assert not batch["image"][~batch["mask"]].any() and (batch["id"][~batch["mask"]] == -1).all()


def test_every_host_evaluates_as_many_batches(source: Source) -> None:
    expected = list(_evaluate(source, batch_size=8, rows=range(8)))
    hosts = [list(_evaluate(source, batch_size=8, rows=range(2 * h, 2 * h + 2))) for h in range(4)]
    assert [len(batches) for batches in hosts] == [2] * 4
    assert hosts[3][1]["mask"].tolist() == [False, False]
    _assert_same(_join(hosts), expected)


def test_evaluation_images_are_cropped_by_eval_crop_and_not_augmented(source: Source) -> None:
    index = 4
    image = decode(source.read(index), 3)  # type: ignore[union-attr]
    uncropped = next(_evaluate(source, dataclasses.replace(AUGMENTED, flip=True)))["image"][index]
    assert np.array_equal(uncropped, resize(image, SIZE))
    cropped = next(_evaluate(source, Data(eval_crop=0.5), image_size=(5, 5)))["image"][index]  # of 12 x 10
    assert np.array_equal(cropped, image[3:8, 2:7])


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_evaluation_images_of_files_and_arrays_are_those_of_the_crop_mode(source: Source, mode: CropMode) -> None:
    data = dataclasses.replace(AUGMENTED, eval_crop=0.8, eval_crop_mode=mode, eval_rounding="transformers", mean=0.2)
    image = decode(source.read(4), 3)  # type: ignore[union-attr]
    expected = fit(image, SIZE, mode, 0.8, "transformers", "bilinear", np.full(3, 51, np.uint8))
    array = ArraySource(image[None], np.zeros(1, np.int32), ("cat",))
    assert np.array_equal(next(_evaluate(source, data))["image"][4], expected)
    batches = _evaluate(array, dataclasses.replace(data, augment_on="host"), batch_size=1, rows=range(1))
    assert np.array_equal(next(batches)["image"][0], expected)


def test_cifar10_is_evaluated_whole(shared: Path) -> None:
    source = open_source(Data(source="tar", path=str(shared / "cifar10")), "test")
    count = 0
    for batch in _evaluate(source, Data(threads=2), image_size=(32, 32), batch_size=384, rows=range(384)):
        count += batch["mask"].sum()
        assert np.array_equal(batch["label"][batch["mask"]], batch["id"][batch["mask"]] // 1000)
    assert count == 10_000


# bad files


@pytest.fixture
def bad_set(image_set: Path, encode: Callable[..., bytes]) -> Path:
    """Two of the 13 training files, neighbours, are bad: ids 5 (cut short) and 6 (text)."""
    dogs = image_set / "train" / "dog"
    (dogs / "0.png").write_bytes(encode(0, (40, 40), "JPEG")[:300])
    (dogs / "1.png").write_bytes(b"<html>not found</html>")
    return image_set


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_an_error_that_names_it(bad_set: Path, workers: int) -> None:
    batches = _train(_open(bad_set), dataclasses.replace(AUGMENTED, workers=workers))
    with pytest.raises(ConfigError, match=r"train/dog/[01].png: .*set data.on_bad=skip"):
        list(batches)
    assert list(batches) == []  # it is closed


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_file_is_replaced_by_the_next_that_decodes(bad_set: Path, workers: int) -> None:
    source = _open(bad_set)
    data = dataclasses.replace(AUGMENTED, on_bad="skip", max_bad_fraction=0.2, workers=workers)
    batches = _train(source, data)
    seen = np.concatenate([batch["id"] for batch in batches])
    wanted = example_ids(1, 13, np.arange(40))
    assert np.array_equal(seen, np.where((wanted == 5) | (wanted == 6), 7, wanted))
    assert sorted(bad.id for bad in batches.bad()) == [5, 6]
    by_id = {bad.id: bad for bad in batches.bad()}
    assert by_id[6] == BadExample(6, f"{bad_set}/train/dog/1.png", "no known image format")
    first_batch = {index: np.flatnonzero(wanted == index)[0] // 8 + 1 for index in (5, 6)}
    for count in range(6):
        assert {bad.id for bad in batches.bad(count)} == {index for index in (5, 6) if first_batch[index] <= count}


def test_a_set_of_nothing_but_bad_files_is_an_error(bad_set: Path) -> None:
    for file in (bad_set / "train").glob("*/*"):
        file.write_bytes(b"")
    data = dataclasses.replace(AUGMENTED, on_bad="skip", max_bad_fraction=1.0)
    with pytest.raises(ConfigError, match="13 of 13 files did not decode.*the file is empty"):
        list(_train(_open(bad_set), data))


@dataclasses.dataclass
class _FailingImages:
    """Encoded images that cannot be read for the first `failures` times, as if a disk or network failed."""

    data: bytes
    failures: int
    error: OSError

    def read(self, index: int) -> bytes:
        self.failures -= 1
        if self.failures >= 0:
            raise self.error
        return self.data


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), TimeoutError("no answer")])
def test_a_file_that_cannot_be_read_at_the_moment_is_not_a_bad_file(
    source: Source, encode: Callable[..., bytes], error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vit_dist.data.stream.pixels._PAUSES_S", (0.01, 0.01))
    data = dataclasses.replace(AUGMENTED, on_bad="skip", max_bad_fraction=1.0, threads=1)
    for failures in (2, 3):
        images = _FailingImages(encode(0), failures, error)
        batches = _train(dataclasses.replace(source, images=images), data, stop_step=1)  # type: ignore[arg-type]
        if failures == 2:
            assert np.array_equal(next(batches)["id"], example_ids(1, 13, np.arange(8))) and batches.bad() == []
        else:
            with pytest.raises(ConfigError, match="cannot be read .*, 3 times over; see to the disk or network"):
                next(batches)


def test_a_killed_worker_is_an_error_and_leaves_no_other_worker(source: Source) -> None:
    batches = _train(source, dataclasses.replace(AUGMENTED, workers=2), stop_step=10**6)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="data.workers: a worker process died"):
        list(batches)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_worker_loads_no_jax(source: Source) -> None:
    """Nor Grain, which imports jax and Orbax: 150 MB and more than half a second in every worker."""
    with contextlib.closing(_train(source, dataclasses.replace(AUGMENTED, workers=1))) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        loaded = Path(f"/proc/{worker.pid}/maps").read_text()
    assert "numpy" in loaded and "jaxlib" not in loaded and "tensorstore" not in loaded


@pytest.mark.parametrize("on_bad", ["skip", "error"])
def test_evaluation_masks_a_bad_file_and_lists_it(bad_set: Path, on_bad: Any) -> None:
    batches = _evaluate(_open(bad_set), dataclasses.replace(AUGMENTED, on_bad=on_bad, max_bad_fraction=0.2))
    mask = np.concatenate([batch["mask"] for batch in batches])
    assert mask.tolist() == [True] * 5 + [False] * 2 + [True] * 6 + [False] * 2
    assert [bad.id for bad in batches.bad()] == [5, 6]


def test_a_file_that_vanished_is_named(image_set: Path) -> None:
    source = _open(image_set)
    (image_set / "train" / "cat" / "2.png").unlink()
    with pytest.raises(ConfigError, match="cat/2.png: .*No such file"):
        list(_train(source))


# the machinery


@pytest.mark.parametrize("workers", [0, 1])
def test_a_closed_loader_leaves_no_thread_or_process(source: Source, workers: int) -> None:
    batches = _train(source, dataclasses.replace(AUGMENTED, workers=workers), stop_step=10**9)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    _wait_until(lambda: not [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")])
    assert not multiprocessing.active_children()


@dataclasses.dataclass
class _CountingImages:
    """Encoded images that count their reads, and how many of these were ahead of the batches taken."""

    data: bytes
    reads: int = 0
    taken: int = 0
    furthest: int = 0
    lock: Any = dataclasses.field(default_factory=threading.Lock)

    def read(self, index: int) -> bytes:
        with self.lock:
            self.reads += 1
            self.furthest = max(self.furthest, self.reads - 8 * self.taken)
        return self.data


@pytest.mark.parametrize(
    ("size", "ahead_mb", "batches_ahead"), [((8, 6), 0.0045, 4), ((64, 96), 1.0, 7), ((64, 96), 0.1, 1)]
)
def test_reading_ahead_is_bounded_in_bytes(
    source: Source, encode: Callable[..., bytes], size: tuple[int, int], ahead_mb: float, batches_ahead: int
) -> None:
    batch_bytes = 8 * size[0] * size[1] * 3
    assert batches_ahead == max(1, ahead_mb * 2**20 // batch_bytes)
    images = _CountingImages(encode(0))
    data = dataclasses.replace(AUGMENTED, read_ahead_mb=ahead_mb)
    counted = dataclasses.replace(source, images=images)  # type: ignore[arg-type]
    with contextlib.closing(_train(counted, data, image_size=size, stop_step=1000)) as batches:
        for taken in range(1, 31):
            images.taken = taken
            next(batches)
            if taken % 10 == 0:  # while the consumer waits, exactly `batches_ahead` are made
                _wait_until(lambda taken=taken: images.reads == 8 * (taken + batches_ahead))
    assert images.furthest == 8 * batches_ahead


def _wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_more_than_a_million_mnist_images_a_second() -> None:
    batch_size, steps = 1024, 400
    batches = _train(
        _array(60_000, (28, 28, 1)),
        Data(),
        channels=1,
        batch_size=batch_size,
        rows=range(batch_size),
        stop_step=steps,
    )
    next(batches)
    start = time.process_time()
    count = sum(len(batch["id"]) for batch in batches)
    assert count == batch_size * (steps - 1)
    assert count / (time.process_time() - start) > 1e6

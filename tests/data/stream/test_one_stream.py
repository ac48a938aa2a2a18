"""Law 1 for data: the same ids, in the same order, as bitwise the same pixels, for any hosts, workers and resumes."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vit_dist.config import Data
from vit_dist.data.sets.examples import Source
from vit_dist.data.sets.sources import open_source
from vit_dist.data.stream.loader import train_batches

BATCH, STEPS, EXAMPLES = 48, 8, 160  # 2.4 epochs
ALL_OF_IT = Data(
    source="folder",
    crop_area=(0.2, 1.0),
    flip=True,
    color_jitter=0.3,
    hue_jitter=0.1,
    randaugment_layers=2,
    randaugment_std=0.5,
    erase=0.3,
    threads=2,
)


@pytest.fixture
def source(tmp_path: Path, encode: Callable[..., bytes]) -> Source:
    for number in range(EXAMPLES):
        file = tmp_path / f"set/train/{number % 4}/{number:03}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(number, (20 + number % 9, 20 + number % 7), "JPEG"))
    return open_source(Data(source="folder", path=str(tmp_path / "set")), "train")


def stream(source: Source, hosts: int, workers: int, start: int = 0, stop: int = STEPS) -> list[tuple[list[int], str]]:
    """Returns the ids, and a digest of pixels and labels, of each step's global batch, joined from the hosts' rows."""
    data, share = dataclasses.replace(ALL_OF_IT, workers=workers), BATCH // hosts
    by_host = []
    for host in range(hosts):
        batches = train_batches(
            source,
            data,
            image_size=(16, 12),
            channels=3,
            seed=3,
            batch_size=BATCH,
            rows=range(host * share, (host + 1) * share),
            start_step=start,
            stop_step=stop,
        )
        by_host.append([{name: np.array(rows) for name, rows in batch.items()} for batch in batches])
    steps = []
    for batches in zip(*by_host, strict=True):
        batch = {name: np.concatenate([rows[name] for rows in batches]) for name in batches[0]}
        digest = hashlib.sha256(batch["image"].tobytes() + batch["label"].tobytes()).hexdigest()
        steps.append((batch["id"].tolist(), digest))
    return steps


@pytest.fixture
def alone(source: Source) -> list[tuple[list[int], str]]:
    return stream(source, hosts=1, workers=0)


@pytest.mark.parametrize(
    ("hosts", "workers"),
    [
        *((2, 0), (4, 0), (1, 2), (2, 1)),
        *(pytest.param(*counts, marks=pytest.mark.slow) for counts in ((1, 1), (1, 4), (4, 1), (2, 4), (4, 4))),
    ],
)
def test_the_stream_is_the_same_on_any_hosts_with_any_workers(
    source: Source, alone: list[tuple[list[int], str]], hosts: int, workers: int
) -> None:
    assert stream(source, hosts, workers) == alone


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4)])
def test_a_resume_in_mid_epoch_on_other_hosts_goes_on_in_the_same_stream(
    source: Source, alone: list[tuple[list[int], str]], before: int, after: int
) -> None:
    for stop in (1, 5):
        assert stop * BATCH % EXAMPLES
        assert stream(source, before, 0, stop=stop) + stream(source, after, 0, start=stop) == alone


def test_every_id_comes_exactly_once_an_epoch(alone: list[tuple[list[int], str]]) -> None:
    ids = [index for step in alone for index in step[0]]
    for epoch in range(2):
        assert sorted(ids[epoch * EXAMPLES : (epoch + 1) * EXAMPLES]) == list(range(EXAMPLES))
    assert len(set(ids[2 * EXAMPLES :])) == len(ids) - 2 * EXAMPLES


def test_every_step_has_other_pixels(alone: list[tuple[list[int], str]]) -> None:
    assert len({digest for _, digest in alone}) == STEPS

"""Bad files on two real processes: each reads some of them, and both list all."""

import json

import numpy as np
import pytest
from PIL import Image
from system import NOTHING_RANDOM, as_two, rows

BAD = {3, 17, 40, 41, 77}  # their ids too: two classes of 48, by name


@pytest.fixture
def folder(tmp_path):
    """96 small images of two classes; five of the training files are text."""
    rng = np.random.default_rng(0)
    for number in range(96):
        file = tmp_path / f"set/train/{number // 48}/{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        if number in BAD:
            file.write_text("not an image")
        else:
            Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(file)
    return tmp_path / "set"


def arguments(folder):
    return (
        *("data.source=folder", f"data.path={folder}", "data.on_bad=skip", "batch_size=32", "total_steps=9"),
        *("log_every=3", "model.num_classes=null", "mesh.data=-1", "model.depth=1", *NOTHING_RANDOM),
    )


def test_both_processes_count_every_bad_file_and_the_run_lists_them(folder, tmp_path):
    first, second = as_two(tmp_path, *arguments(folder), "data.max_bad_fraction=0.1")
    assert (first.wait(), second.wait()) == (0, 0), first.said()[-3000:] + second.said()[-3000:]
    listed = [json.loads(line) for line in (tmp_path / "run/failures/bad_images.jsonl").read_text().splitlines()]
    assert {row["id"] for row in listed} == BAD and len(listed) == len(BAD)
    for row in listed:
        assert row["split"] == "train" and row["reason"] == "no known image format"
        assert row["name"] == f"{folder}/train/{row['id'] // 48}/{row['id']:02}.png"
    assert [row["skipped"] for row in rows(tmp_path / "run")][-1] == len(BAD)


def test_too_many_bad_files_over_both_stop_both(folder, tmp_path):
    """Neither process alone reads too many: 5 of 96 are above the limit, but each process reads about half of them."""
    first, second = as_two(tmp_path, *arguments(folder), "data.max_bad_fraction=0.045", "data.read_ahead_mb=0.001")
    assert (first.wait(), second.wait()) == (2, 2), first.said()[-3000:] + second.said()[-3000:]
    for process in (first, second):
        assert (
            "error: data.max_bad_fraction: 5 of 96 files did not decode, more than the share of 0.045" in process.said()
        )

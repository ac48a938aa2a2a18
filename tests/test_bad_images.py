"""Files that do not decode: counted and listed alike however the run is cut up, and too many stop it."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image
from system import NOTHING_RANDOM, checkpoint_steps, command, rows, started, train_here, until

from vit_dist.config import ConfigError
from vit_dist.evaluate import evaluate

BAD = {"train": {3, 17, 40, 41, 77}, "test": {5, 9}}
PLAIN = ("model.depth=1", *NOTHING_RANDOM)
RUN = (
    *("data.source=folder", "data.on_bad=skip", "batch_size=32", "total_steps=9", "log_every=1", "mesh.data=8"),
    *("model.num_classes=null", "data.max_bad_fraction=0.1", "checkpoint.every_steps=3", "evaluate.every_steps=6"),
    *PLAIN,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """96 small images of two classes to train on and 24 to test on; of the first five are text, of the others two."""
    root, rng = tmp_path_factory.mktemp("set"), np.random.default_rng(0)
    for split, count in (("train", 96), ("test", 24)):
        for number in range(count):
            file = root / f"{split}/{2 * number // count}/{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            if number in BAD[split]:
                file.write_text("not an image")
            else:
                Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(file)
    return root


def listed(workdir):
    return [json.loads(line) for line in (workdir / "failures/bad_images.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return train_here(workdir, *RUN, f"data.path={folder}"), listed(workdir), workdir


def test_every_bad_file_is_listed_once_with_the_step_that_met_it(folder, whole):
    found, bad, _ = whole
    assert {(row["split"], row["id"]) for row in bad} == {(s, i) for s, ids in BAD.items() for i in ids}
    assert len(bad) == 7
    for row in bad:
        assert row["reason"] == "no known image format"
        assert row["name"].startswith(f"{folder}/{row['split']}/") and row["name"].endswith(f"/{row['id']:02}.png")
    for row in found:
        known = [one for one in bad if one["split"] == row["split"] and one["step"] <= row["step"]]
        assert row.get("skipped", 0) == len(known)
    assert [row["count"] for row in found if row["split"] == "test"] == [22, 22]


@pytest.mark.parametrize("ahead", ["0.001", "64"])
def test_what_is_read_ahead_does_not_count(folder, whole, tmp_path, ahead):
    found = train_here(tmp_path / "run", *RUN, f"data.path={folder}", f"data.read_ahead_mb={ahead}", "data.prefetch=1")
    assert (found, listed(tmp_path / "run")) == whole[:2]


def test_a_run_that_was_cut_lists_and_counts_the_same_and_notes_anew_what_lies_past_its_step(folder, whole, tmp_path):
    train_here(tmp_path / "run", *RUN, f"data.path={folder}", "total_steps=3", "evaluate.every_steps=0")
    file = tmp_path / "run/failures/bad_images.jsonl"
    assert listed(tmp_path / "run") == [row for row in whole[1] if row["split"] == "train" and row["step"] <= 3]
    later = {"step": 7, "split": "train", "id": 77, "name": "as a killed session had it", "reason": "x"}
    file.write_text(file.read_text() + json.dumps(later) + "\n")
    found = train_here(tmp_path / "run", *RUN, f"data.path={folder}")
    assert listed(tmp_path / "run") == whole[1]
    assert [row.get("skipped") for row in found if row["split"] == "train"] == [
        row.get("skipped") for row in whole[0] if row["split"] == "train"
    ]


def test_too_many_stop_the_run_at_a_step_that_follows_from_the_data_alone(folder, whole, tmp_path):
    first = min(row["step"] for row in whole[1] if row["split"] == "train" and row["id"] in BAD["train"])
    with pytest.raises(
        ConfigError, match=r"data.max_bad_fraction: \d of 96 files did not decode, more than the share of 0 that may"
    ):
        train_here(tmp_path / "run", *RUN, f"data.path={folder}", "data.max_bad_fraction=0")
    assert [row["step"] for row in rows(tmp_path / "run") if row["split"] == "train"] == list(range(1, first))


def test_too_many_stop_an_evaluation(whole):
    assert evaluate(whole[2])["count"] == 22
    with pytest.raises(
        ConfigError, match="data.max_bad_fraction: 2 of 24 files did not decode, more than the share of 0.05 that may"
    ):
        evaluate(whole[2], overrides=["data.max_bad_fraction=0.05"])


def test_any_file_name_can_be_listed(tmp_path):
    """Names that are no UTF-8, and some that `str.splitlines` would break a line at."""
    for number in range(40):
        file = tmp_path / f"set/train/{number % 2}/{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 6 * number, np.uint8)).save(file)
    names = [os.fsdecode(b"\xff\xfe.jpg"), "a\u2028b.jpg", "a\x85b.jpg", "ä\nb.jpg"]
    for name in names:
        (tmp_path / "set/train/1" / name).write_text("no image")
    run = (*RUN, f"data.path={tmp_path}/set", "evaluate.every_steps=0")
    train_here(tmp_path / "run", *run, "total_steps=5")
    train_here(tmp_path / "run", *run)
    shown = {r"\xff\xfe.jpg", r"a\u2028b.jpg", r"a\x85b.jpg", r"ä\nb.jpg"}
    assert {row["name"].rpartition("/")[2] for row in listed(tmp_path / "run")} == shown


def test_a_signal_to_all_processes_of_a_job_is_answered_by_the_first_while_its_workers_go_on(tmp_path):
    """Schedulers send SIGTERM to workers too; images are large, so that the step waits for what they make."""
    rng = np.random.default_rng(0)
    for number in range(64):
        file = tmp_path / f"set/train/{number % 2}/{number:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (500, 500), np.uint8)).save(file, quality=95)
    one_device = ("fake_devices=1", "mesh.data=1", *PLAIN)
    data = ("data.source=folder", f"data.path={tmp_path}/set", "data.workers=2", "data.read_ahead_mb=0.02")
    run = ("model.num_classes=null", "batch_size=64", "total_steps=100000", *one_device, *data)
    arguments = command(tmp_path / "run", *run)
    with started(arguments, tmp_path / "said", start_new_session=True) as running:
        until(lambda: "step 3/" in running.said(), running)
        os.killpg(running.process.pid, signal.SIGTERM)
        assert running.wait() == 75, running.said()[-3000:]
    assert checkpoint_steps(tmp_path / "run") and "Traceback" not in running.said()

"""Metrics: one row for each step and split, also after a kill and resume; TensorBoard's own reader opens the files."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vit_dist.config import ConfigError
from vit_dist.run.metrics import JsonLinesWriter, MetricLog, StepProfile, read_rows


def train(workdir, resume_step, steps):
    workdir.mkdir(exist_ok=True)
    log = MetricLog(workdir, resume_step=resume_step)
    for step in steps:
        log.write(step, "train", {"loss": 1 / step})
        if step % 20 == 0:
            log.write(step, "test", {"count": 360, "loss": 2 / step, "top1": 0.5})
    log.close()


def scalars(workdir, tag):
    reader = EventAccumulator(str(workdir / "tensorboard"))
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def test_a_row_holds_what_was_written(tmp_path):
    log = MetricLog(tmp_path, resume_step=None)
    loss = np.float32(1.1)
    log.write(20, "train", {"loss": loss, "grad_norm": jnp.float32(0.5), "examples": "9f86", "mfu": None})
    log.write(20, "test/ema", {"count": 360, "per_class": np.array([0.5, 1.0])})
    log.flush()
    assert read_rows(tmp_path) == [
        {"step": 20, "split": "train", "loss": float(loss), "grad_norm": 0.5, "examples": "9f86"},
        {"step": 20, "split": "test/ema", "count": 360, "per_class": [0.5, 1.0]},
    ]
    log.close()


def test_numbers_that_are_not_finite_are_null_and_named(tmp_path):
    log = MetricLog(tmp_path, resume_step=None)
    log.write(1, "train", {"loss": float("nan"), "grad_norm": np.float32("inf"), "norms": [1.0, float("nan")]})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (row["loss"], row["grad_norm"], row["norms"]) == (None, None, [1.0, None])
    assert row["non_finite"] == {"loss": "nan", "grad_norm": "inf", "norms": "[1.0, nan]"}


def test_rows_are_readable_before_the_log_is_closed(tmp_path):
    log = MetricLog(tmp_path, resume_step=None)
    log.write(1, "train", {"loss": 1.0})
    assert len(read_rows(tmp_path)) == 1  # a kill -9 now would not lose it
    log.close()


def test_the_rows_of_a_resumed_run_are_those_of_a_run_never_killed(tmp_path):
    train(tmp_path / "undisturbed", None, range(1, 61))
    train(tmp_path / "killed", None, range(1, 51))
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 51, "split": "tr')  # killed in the middle of a row
    train(tmp_path / "killed", 40, range(41, 61))
    undisturbed, killed = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("undisturbed", "killed"))
    assert undisturbed == killed
    assert [row["step"] for row in read_rows(tmp_path / "undisturbed") if row["split"] == "test"] == [20, 40, 60]
    for tag in ("train/loss", "test/top1"):
        assert scalars(tmp_path / "killed", tag) == scalars(tmp_path / "undisturbed", tag)


def test_a_run_without_a_checkpoint_begins_its_rows_anew(tmp_path):
    train(tmp_path, None, range(1, 10))
    train(tmp_path, None, range(1, 4))
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]
    assert scalars(tmp_path, "train/loss") == [(1, 1.0), (2, 0.5), (3, np.float32(1 / 3))]


def test_the_event_files_hold_the_numbers_of_the_rows(tmp_path):
    train(tmp_path, None, range(1, 21))
    assert scalars(tmp_path, "test/loss") == [(20, np.float32(0.1))]
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == list(range(1, 21))


def test_a_line_that_is_no_row_is_an_error_that_names_it(tmp_path):
    assert read_rows(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\nhello\n{"step": 2, "split": "train"}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl:2: not JSON .*; repair the line or remove it"):
        read_rows(tmp_path)


def test_calls_for_one_step_and_split_make_one_row(tmp_path):
    writer = JsonLinesWriter(tmp_path / "metrics.jsonl")
    writer.write_scalars(1, {"train/loss": 1.0, "train/lr": 0.1})
    writer.write_texts(1, {"train/examples": "ab"})
    writer.write_scalars(2, {"train/loss": 0.5, "test/ema/loss": 0.7})
    writer.close()
    assert read_rows(tmp_path) == [
        {"step": 1, "split": "train", "loss": 1.0, "lr": 0.1, "examples": "ab"},
        {"step": 2, "split": "train", "loss": 0.5},
        {"step": 2, "split": "test/ema", "loss": 0.7},
    ]


def test_a_profile_is_taken_of_the_steps_asked_for(tmp_path):
    action = StepProfile(tmp_path, start_step=2, steps=2)
    assert [action(step) for step in range(1, 6)] == [False, True, False, True, False]
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1
    resumed = StepProfile(tmp_path / "resumed", start_step=2, steps=2)
    assert [resumed(step) for step in range(3, 6)] == [False, True, False]
    assert not (tmp_path / "resumed").exists()


def test_a_run_that_ends_inside_the_profile_keeps_it(tmp_path):
    action = StepProfile(tmp_path, start_step=1, steps=100)
    action(1)
    action.close()
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_clu_is_used_without_tensorflow():
    code = "import sys, vit_dist.run.metrics; print('clu.periodic_actions' in sys.modules, 'tensorflow' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["True", "False"]

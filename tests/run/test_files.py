"""Files of a workdir that a person has edited or a disk has damaged: read as declared, or refused by name."""

import json
import os

import pytest

from vit_dist.config import ConfigError
from vit_dist.run import workdir as run_files
from vit_dist.run.environment import sessions
from vit_dist.run.failures import BadExampleList
from vit_dist.run.files import COUNT, NUMBER, TEXT, WHOLE, mismatch, read_json, read_json_lines
from vit_dist.run.metrics import read_rows

# What is damaged whatever the file is for, and what the error says.
DAMAGED = {
    "empty": (b"", "not JSON"),
    "cut": (b'{"step": 1, "spl', "not JSON"),
    "no UTF-8": (b'"\xff\xfe"', "not JSON"),
    "brackets": (b"[" * 100_000, "nested too deeply"),
    "digits": (b"1" * 5000, r"not JSON \(Exceeds the limit \(4300 digits\)[^;]*\); "),
    "another type": (b"3", "expected an? .*, found 3"),
    "null": (b"null", "expected an? .*, found null"),
}
READERS = {
    "config.json": run_files.read_config,
    "summary.json": run_files.summary,
    "classes.json": run_files.class_names,
    "environment.json": sessions,
    "metrics.jsonl": read_rows,
    "failures/bad_images.jsonl": lambda workdir: BadExampleList(workdir, resume_step=9),
}
ROW = {"step": 1, "split": "train", "id": 3, "name": "a", "reason": "b"}
SUMMARY = {"step": 2, "count": 9, "loss": 0.5, "top1": 1, "seconds": 3.5, "workdir": "a"}


def spoil(workdir, name, content):
    (workdir / "failures").mkdir()
    (workdir / "config.json").write_text('{"total_steps": 2, "model": {"num_classes": 2}}')
    (workdir / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_refused_by_name(tmp_path, name, damage):
    content, message = DAMAGED[damage]
    rows = name.endswith(".jsonl")
    if rows and damage == "empty":
        content = b"\n"
    spoil(tmp_path, name, content + b"\n" * rows)
    with pytest.raises(ConfigError, match=f"^{tmp_path}/{name}{':1' * rows}: .*{message}") as raised:
        READERS[name](tmp_path)
    assert "repair the line or remove it" in str(raised.value) or "restore it" in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("name", READERS)
def test_a_folder_or_pipe_in_place_of_a_file_is_refused(tmp_path, name):
    spoil(tmp_path, name, b"")
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    if name != "config.json":  # without one there is no run
        with pytest.raises(ConfigError, match=f"^{tmp_path}/{name}: it is a pipe, device or folder"):
            READERS[name](tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", {"total_steps": 2, "model": {"num_classes": None}}, "model.num_classes: null, where each run"),
        ("config.json", {"total_epochs": 2, "model": {"num_classes": 2}}, "total_steps: null, where each run has a"),
        ("config.json", {"total_steps": 1e400}, "total_steps: expected a whole number above 0 or null, found inf"),
        ("summary.json", {}, "has no key 'step'"),
        ("summary.json", SUMMARY | {"step": "x"}, 'step: expected a whole number, 0 or more, found "x"'),
        ("summary.json", SUMMARY | {"step": True}, "step: expected a whole number, 0 or more, found true"),
        ("summary.json", SUMMARY | {"step": -1}, "step: expected a whole number, 0 or more, found -1"),
        ("summary.json", SUMMARY | {"step": 10**400}, r"step: expected a whole number, 0 or more, found 10+ \.\.\.;"),
        ("summary.json", SUMMARY | {"loss": 10**400}, r"loss: expected a number, found 10+ \.\.\.;"),
        ("summary.json", SUMMARY | {"seconds": 1e400}, "seconds: expected a number, found Infinity"),
        ("summary.json", SUMMARY | {"seconds": None}, "seconds: expected a number, found null"),
        ("summary.json", SUMMARY | {"workdir": ["a"]}, "workdir: expected text, found a list of 1"),
        ("classes.json", ["a", "b", "c"], "holds 3 names, but the model has 2 classes"),
        ("classes.json", ["a", 3], r"\[1\]: expected text, found 3"),
        ("classes.json", b'["\\ud800"]', "not JSON that can be written again .*surrogates"),
        ("environment.json", [], "holds no session"),
        ("environment.json", [1], r"\[0\]: expected an object, found 1"),
        ("environment.json", [{"data": {}}, {}], r"\[1\]: has no key 'data'"),
        ("environment.json", [{"data": {"train": 3}}], r"\[0\].data.train: expected text, found 3"),
        ("environment.json", [{"data": {}, "weights": 3}], r"\[0\].weights: expected an object, found 3"),
        ("environment.json", [{"data": {}, "weights": {}}], r"\[0\].weights: has no key 'name'"),
        (
            "environment.json",
            b'[{"data": {}, "x": ' + b"[" * 200 + b"]" * 200 + b"}]",
            "not JSON .* again .it is nested",
        ),
        ("metrics.jsonl", b'{"split": "train"}\n', "has no key 'step'"),
        ("metrics.jsonl", b'{"step": 1}\n', "has no key 'split'"),
        ("metrics.jsonl", b'{"step": 1, "split": "a", "loss": "x"}\n', 'loss: expected a number, found "x"'),
        ("failures/bad_images.jsonl", ROW | {"id": "x"}, 'id: expected a whole number, 0 or more, found "x"'),
        ("failures/bad_images.jsonl", ROW | {"reason": None}, "reason: expected text, found null"),
        ("failures/bad_images.jsonl", {**ROW, "split": {}}, "split: expected text, found an object that is empty"),
    ],
)
def test_a_file_of_another_shape_is_refused_by_the_key_that_is_wrong(tmp_path, name, content, message):
    spoil(tmp_path, name, content)
    with pytest.raises(ConfigError, match=f"^{tmp_path}/{name}(:1)?: {message}"):
        READERS[name](tmp_path)


def test_what_has_the_shape_is_read(tmp_path):
    spoil(tmp_path, "summary.json", SUMMARY | {"loss": None, "more": {"deep": [1]}})
    assert run_files.summary(tmp_path) == SUMMARY | {"loss": None, "more": {"deep": [1]}}
    (tmp_path / "classes.json").write_text('["a"]')
    assert run_files.class_names(tmp_path) == ("a",)  # the last outputs may have no names
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "a", "loss": null, "x": [1]}\n{"step": 2')
    assert read_rows(tmp_path) == [{"step": 1, "split": "a", "loss": None, "x": [1]}]
    (tmp_path / "failures/bad_images.jsonl").write_text(json.dumps(ROW))
    BadExampleList(tmp_path, resume_step=9).check("train", 0.5, 10)


def test_only_the_last_line_of_a_file_that_is_added_to_may_be_cut(tmp_path):
    file = tmp_path / "rows.jsonl"
    assert read_json_lines(file, {"a": WHOLE}) == []
    file.write_text('{"a": 1}\n{"a": 2')
    assert read_json_lines(file, {"a": WHOLE}, cut=True) == [('{"a": 1}\n', {"a": 1})]
    with pytest.raises(ConfigError, match="rows.jsonl:2: not JSON"):
        read_json_lines(file, {"a": WHOLE})


def test_a_file_that_is_too_large_or_missing_is_refused(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(ConfigError, match="a.json: missing; call the doctor"):
        read_json(file, TEXT, "call the doctor")
    with open(file, "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(ConfigError, match="a.json: is larger than 64 MiB"):
        read_json(file, TEXT)


def test_shapes_may_leave_keys_out_and_stand_for_all():
    shape = {"a": [NUMBER], "b?": COUNT, "*": TEXT}
    assert mismatch({"a": [1, 2.5]}, shape) == "" == mismatch({"a": [], "b": None, "c": "x"}, shape)
    assert mismatch({"a": [1, None]}, shape) == "a[1]: expected a number, found null"
    assert mismatch({"a": [], "b": 0}, shape) == "b: expected a whole number above 0, found 0"
    assert mismatch({"a": [], "c": 1}, shape) == "c: expected text, found 1"
    assert mismatch([], shape) == "expected an object, found a list that is empty"

"""Names of folders are bytes: those that are no text, or that a terminal would obey, are used, and are harmless."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet
import pytest

from vit_dist import cli

REPOSITORY = Path(__file__).parents[1]
SMALLEST = str(Path(__file__).parent / "helpers" / "smallest.py")
CLASSES = (b"\x1b[2J\nerror: forged", b"caf\xe9", b"plain", "\u202ereordered".encode())
NAMES = [r"\x1b[2J\nerror: forged", r"caf\xe9", "plain", r"\u202ereordered"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = os.fsencode(tmp_path_factory.mktemp("hostile") / "images")
    rng = np.random.default_rng(0)
    for split in (b"train", b"test"):
        for name in CLASSES:
            folder = os.path.join(root, split, name)
            os.makedirs(folder)
            for number in range(6):
                pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
                with open(os.path.join(folder, b"%d\xff\n\x1b.png" % number), "wb") as stream:
                    stream.write(cv2.imencode(".png", pixels)[1].tobytes())
    with open(os.path.join(root, b"train", CLASSES[0], b"bad\xff.png"), "wb") as stream:
        stream.write(b"no image")
    return os.fsdecode(root)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run on them, as the command makes it, and what the command has said."""
    workdir = tmp_path_factory.mktemp("hostile") / "run"
    words = ["data.source=folder", f"data.path={data}", "model.channels=3", "model.num_classes=null", "batch_size=4"]
    words += ["fake_devices=8", "data.on_bad=skip", "data.max_bad_fraction=0.5", "total_steps=6"]
    command = [sys.executable, "-m", "vit_dist", "train", f"--config={SMALLEST}", f"--workdir={workdir}"]
    done = subprocess.run([*command, *(f"--config.{word}" for word in words)], capture_output=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr.decode()
    return workdir, done


def harmless(text):
    return all(map(str.isprintable, set(text) - {"\n"})) and not re.search("^error: forged", text, re.MULTILINE)


def test_a_run_on_them_keeps_names_that_can_be_written_and_printed(trained):
    workdir, done = trained
    assert harmless(done.stdout.decode()) and harmless(done.stderr.decode())
    assert json.loads((workdir / "classes.json").read_text()) == NAMES
    bad = json.loads((workdir / "failures/bad_images.jsonl").read_text())
    assert bad["name"].endswith(r"train/\x1b[2J\nerror: forged/bad\xff.png")


def test_predictions_tables_and_logs_of_them_are_harmless(trained, data, capsys, tmp_path):
    workdir, _ = trained
    assert cli.main(["predict", f"--workdir={workdir}", f"{data}/test"]) == 0
    out, err = capsys.readouterr()
    assert harmless(out) and harmless(err) and out.count("\n") == 1 + 4 * 6 * 4
    assert r"test/caf\xe9/0\xff\n\x1b.png" in out and "\n" not in out.splitlines()[1]
    assert cli.main(["predict", f"--workdir={workdir}", "--json", f"{data}/train"]) == 2
    out, err = capsys.readouterr()
    assert harmless(out) and harmless(err)
    assert {choice["name"] for line in out.splitlines() for choice in json.loads(line).get("classes", [])} == set(NAMES)
    assert cli.main(["predict", f"--workdir={workdir}", f"{data}/test", f"--out={tmp_path}/a.parquet"]) == 0
    assert set(pyarrow.parquet.read_table(tmp_path / "a.parquet")["class_1"].to_pylist()) <= set(NAMES)


def test_features_of_them_have_names(trained, tmp_path, capsys):
    workdir, _ = trained
    for split in ("train", "test"):
        assert cli.main(["features", f"--workdir={workdir}", f"--split={split}", f"{tmp_path}/{split}.parquet"]) == 0
    table = pyarrow.parquet.read_table(tmp_path / "test.parquet")
    assert sorted(set(table["class"].to_pylist())) == sorted(NAMES)
    assert r"caf\xe9/0\xff\n\x1b.png" in " ".join(table["name"].to_pylist())
    words = ["--features", f"{tmp_path}/train.parquet", f"{tmp_path}/test.parquet"]
    assert cli.main(["probe", *words, "--probes=knn", "--k=3"]) == 0
    out, err = capsys.readouterr()
    assert harmless(out) and harmless(err)


def test_the_card_of_a_model_of_them_lists_each_in_its_line(trained, tmp_path, capsys):
    workdir, _ = trained
    assert cli.main(["export", f"--workdir={workdir}", "--format=safetensors", f"{tmp_path}/out"]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert harmless(card) and card.splitlines()[-1] == ", ".join(NAMES)
    assert harmless("".join(capsys.readouterr()))


def test_prepared_records_of_them_are_the_same_set(trained, data, tmp_path, capsys):
    workdir, _ = trained
    capsys.readouterr()
    assert cli.main(["prepare", data, f"{tmp_path}/records", "--shards=1"]) == 0
    words = [f"--workdir={workdir}", "--config.data.source=array_record", f"--config.data.path={tmp_path}/records"]
    assert cli.main(["eval", *words]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["class_top1"].keys() == set(NAMES)

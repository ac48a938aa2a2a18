"""Predictions as files: CSV, JSON lines and Parquet hold what `--json` prints, and what did not decode in its place."""

import csv
import json
import sys

import cv2
import numpy as np
import pyarrow.parquet
import pytest

from vit_dist import cli, recipes
from vit_dist.train import train

SMALLEST = __file__.replace("test_answers.py", "helpers/smallest.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("answers") / "run"
    train(recipes.load(SMALLEST), workdir)
    return workdir


@pytest.fixture
def photos(tmp_path):
    """Five images, of which the third is none; a name has a comma, a quote and bytes that are no text."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        cv2.imwrite(f"{folder}/{number}.png", np.random.default_rng(number).integers(0, 256, (9, 9), np.uint8))
    (folder / "2.png").write_text("no image")
    (folder / "4.png").rename(folder / 'x, "y".png')
    return folder


@pytest.fixture
def said(capsys):
    """Runs `predict` and returns its exit code, stdout and stderr."""

    def run(*words):
        capsys.readouterr()
        code = cli.main(["predict", *map(str, words)])
        return code, *capsys.readouterr()

    return run


def test_every_file_format_holds_what_json_prints(run, photos, tmp_path, said):
    words = (f"--workdir={run}", "--top=2", photos)
    code, printed, errors = said(*words, "--json")
    expected = [json.loads(line) for line in printed.splitlines()]
    assert code == 2 and "error: 1 of 5 files did not decode" in errors
    assert [list(one) for one in expected] == [["file", "classes"]] * 2 + [["file", "error"]] + [
        ["file", "classes"]
    ] * 2
    for suffix in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"out.{suffix}"
        code, printed, errors = said(*words, f"--out={out}")
        assert (code, json.loads(printed)) == (2, {"out": str(out), "images": 5, "errors": 1})
        assert errors.endswith("error: 1 of 5 files did not decode\n")
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected
    flat = []
    for one in expected:
        row = {"file": one["file"]}
        for rank in (1, 2):
            choice = one["classes"][rank - 1] if "classes" in one else {"name": None, "probability": None}
            row |= {f"class_{rank}": choice["name"], f"probability_{rank}": choice["probability"]}
        flat.append({**row, "error": one.get("error")})
    assert pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist() == flat
    with open(tmp_path / "out.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert rows == [{key: "" if value is None else str(value) for key, value in row.items()} for row in flat]
    assert [row["error"] for row in rows] == ["", "", "no known image format", "", ""]
    assert rows[4]["file"] == f'{photos}/x, "y".png'


def test_the_table_names_what_did_not_decode_and_files_without_errors_end_with_zero(run, photos, said):
    code, printed, _ = said(f"--workdir={run}", "--top=1", photos)
    assert code == 2
    lines = printed.splitlines()
    assert [line.split("  ")[0].rpartition("/")[2] for line in lines[1:]] == [
        "0.png", "1.png", "2.png", "3.png", 'x, "y".png',
    ]  # fmt: skip
    assert lines[3].endswith("(no known image format)")
    (photos / "2.png").unlink()
    code, printed, errors = said(f"--workdir={run}", "--top=1", photos)
    assert (code, errors) == (0, "") and len(printed.splitlines()) == 5


def test_many_rows_are_row_groups(run, photos, tmp_path, said, monkeypatch):
    monkeypatch.setattr(sys.modules["vit_dist.answers"], "_ROWS", 2)
    said(f"--workdir={run}", photos, f"--out={tmp_path}/out.parquet")
    file = pyarrow.parquet.ParquetFile(tmp_path / "out.parquet")
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [2, 2, 1]


def test_there_are_as_many_columns_as_classes_and_the_case_of_a_suffix_is_no_matter(run, photos, tmp_path, said):
    for suffix in ("CSV", "Parquet"):
        assert said(f"--workdir={run}", "--top=20000000", photos, f"--out={tmp_path}/out.{suffix}")[0] == 2
    with open(tmp_path / "out.CSV", newline="") as stream:
        columns = next(csv.reader(stream))
    assert columns == pyarrow.parquet.read_schema(tmp_path / "out.Parquet").names
    assert columns == [
        "file",
        *(f"{name}_{rank}" for rank in range(1, 11) for name in ("class", "probability")),
        "error",
    ]
    assert said(f"--workdir={run}", photos / "2.png", f"--out={tmp_path}/bad.csv")[0] == 2
    assert (tmp_path / "bad.csv").read_text() == f"file,error\n{photos}/2.png,no known image format\n"


def test_a_folder_in_which_no_file_can_be_made_is_one_line(run, photos, said):
    code, printed, errors = said(f"--workdir={run}", photos, "--out=/proc/self/out.csv")
    assert (code, printed) == (2, "")
    assert errors == (
        "error: /proc/self/out.csv: nothing can be made in /proc/self (No such file or directory); give another\n"
    )


def test_an_out_that_cannot_be_is_refused_before_anything_is_computed(run, photos, tmp_path, said, monkeypatch):
    said(f"--workdir={run}", photos)  # imports the module
    monkeypatch.setattr(sys.modules["vit_dist.predict"], "opened", lambda *_: pytest.fail("read the run"))
    (tmp_path / "mine.csv").write_text("mine")
    (tmp_path / "link.csv").symlink_to(tmp_path / "nowhere.csv")
    for out, message in (
        ("out.xlsx", "expected a name that ends in .csv, .jsonl, .parquet"),
        ("mine.csv", "exists; remove it or give another name"),
        ("link.csv", "exists; remove it or give another name"),
        ("no/out.csv", f"there is no folder {tmp_path}/no"),
    ):
        code, printed, errors = said(f"--workdir={run}", photos, f"--out={tmp_path}/{out}")
        assert (code, printed) == (2, "") and errors.startswith(f"error: out: {tmp_path}/{out}: {message}")
    assert (tmp_path / "mine.csv").read_text() == "mine"


def test_a_run_that_stops_in_the_middle_leaves_no_file(run, photos, tmp_path, monkeypatch):
    module = sys.modules["vit_dist.predict"]

    def stops(*_):
        yield {"file": "a", "classes": []}
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_each", stops)
    assert cli.main(["predict", f"--workdir={run}", str(photos), f"--out={tmp_path}/out.csv"]) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]

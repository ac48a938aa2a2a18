"""`evaluate.probes`: rows of a run, the same on any mesh and after a resume."""

import dataclasses
import importlib
import json
import re

import cv2
import numpy as np
import pytest
from system import NOTHING_RANDOM, assert_same_run, rows, settings, train_here

from vit_dist.config import ConfigError
from vit_dist.extraction import Extractor
from vit_dist.probe import probe
from vit_dist.run.curves import draw
from vit_dist.train import train

loop = importlib.import_module("vit_dist.train")
PROBED = (
    *("total_steps=8", "ema_decay=0.5", "evaluate.every_steps=4", "checkpoint.every_steps=4"),
    *("evaluate.probes=[knn,few_shot,linear]", "probe.k=[1,20]", "probe.shots=[1,5]"),
    *NOTHING_RANDOM,
)
NAMES = [f"test/{name}" for name in ("knn/1", "knn/20", "few_shot/1", "few_shot/5", "linear")]
MESH = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")


def probed(rows):
    return [row for row in rows if row["split"].count("/") and row["split"] != "test/ema"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed") / "run"
    train_here(folder, "mesh.data=1", *PROBED)
    return folder


def test_every_evaluation_has_a_row_of_each_probe_after_those_of_its_splits(workdir):
    found = [row for row in rows(workdir) if row["split"] != "train"]
    assert [row["split"] for row in found] == ["test", "test/ema", *NAMES] * 2
    assert [row["step"] for row in found] == [4] * 7 + [8] * 7
    for row in probed(found):
        assert row["count"] == 360
        assert 0.2 < row["top1"] < 1
    by_split = {row["split"]: row for row in found}
    examples = [by_split[name]["examples"] for name in NAMES]
    assert examples == [1437, 1437, 10, 50, 1437]
    for name in NAMES[2:]:
        row = by_split[name]
        assert row["top1"] == row["top1_by_l2"][settings().probe.l2.index(row["l2"])]
        assert len(row["top1_by_l2"]) == len(settings().probe.l2)


def test_the_rows_are_of_the_average_and_the_verb_finds_the_same(workdir):
    found = probe(workdir, overrides=("probe.k=[1,20]", "probe.shots=[1,5]", "mesh.data=8"))
    assert (found["split"], found["count"]) == ("test", 360)
    expected = {row["split"].removeprefix("test/"): row for row in probed(rows(workdir)) if row["step"] == 8}
    assert list(found["probes"]) == list(expected)
    for name, row in found["probes"].items():
        by_l2 = row.pop("top1_by_l2", None)
        wanted = {key: value for key, value in expected[name].items() if key in row}
        assert row == pytest.approx(wanted)
        if by_l2 is not None:
            assert list(by_l2) == ["0.0001", "0.001", "0.01", "0.1", "1", "10"]
            assert list(by_l2.values()) == pytest.approx(expected[name]["top1_by_l2"])


def test_a_probe_changes_nothing_of_the_training_and_its_summary(workdir, tmp_path):
    plain = train_here(tmp_path, "mesh.data=1", *PROBED, "evaluate.probes=[]")
    assert plain == [row for row in rows(workdir) if row not in probed(rows(workdir))]
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (workdir, tmp_path)]
    assert len({(each["count"], each["loss"], each["top1"]) for each in summaries}) == 1


def test_the_rows_are_the_same_on_another_mesh(workdir, tmp_path):
    """Of equal parameters; those of two meshes differ by rounding, which one example in 360 may notice."""
    found = probed(train_here(tmp_path, *MESH, *PROBED))
    for ours, theirs in zip(found, probed(rows(workdir)), strict=True):
        assert (ours["step"], ours["split"]) == (theirs["step"], theirs["split"])
        assert ours["top1"] == pytest.approx(theirs["top1"], abs=1.5 / 360)


def test_probes_of_one_checkpoint_are_the_same_on_every_mesh(workdir):
    meshes = (("mesh.data=1",), ("mesh.data=8",), MESH)
    found = [probe(workdir, overrides=("evaluate.batch_size=100", *mesh)) for mesh in meshes]
    assert found[0] == found[1] == found[2]


def test_a_run_that_broke_off_and_goes_on_has_the_same_rows(workdir, tmp_path, monkeypatch):
    write = loop.Session._write_pending

    def broken(session):
        write(session)
        if session.step == 7:
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(loop.Session, "_write_pending", broken)
        with pytest.raises(RuntimeError, match="killed"):
            train_here(tmp_path, "mesh.data=1", *PROBED)
    train_here(tmp_path, "mesh.data=1", *PROBED)
    assert_same_run(tmp_path, workdir, 8, *PROBED)
    assert (draw(tmp_path)).read_bytes() == (draw(workdir)).read_bytes()


def test_curves_and_tensorboard_show_the_probes(workdir):
    assert "test/few_shot/5" in (workdir / "curves.svg").read_text()
    events = b"".join(file.read_bytes() for file in (workdir / "tensorboard").iterdir())
    assert b"test/knn/20/top1" in events and b"test/linear/l2" in events


def test_a_few_shot_probe_alone_reads_the_images_of_its_shots_alone(workdir, tmp_path, monkeypatch):
    sizes, everything = [], Extractor.all
    monkeypatch.setattr(
        Extractor,
        "all",
        lambda self, parameters, source, note: sizes.append(len(source)) or everything(self, parameters, source, note),
    )
    alone = train_here(tmp_path, "mesh.data=1", *PROBED, "evaluate.probes=[few_shot]")
    assert sizes == [50, 360] * 2
    assert probed(alone) == [row for row in probed(rows(workdir)) if "few_shot" in row["split"]]


def test_a_file_that_a_probe_skips_is_listed_once_by_its_id(tmp_path):
    for split, count in (("train", 12), ("test", 4)):
        for label in "ab":
            folder = tmp_path / "images" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                cv2.imwrite(str(folder / f"{number:02}.png"), np.full((8, 8), 9 * number, np.uint8))
    (tmp_path / "images/train/b/11.png").write_text("no image")
    overrides = (
        *("mesh.data=1", *PROBED, "data.source=folder", f"data.path={tmp_path}/images", "data.on_bad=skip"),
        *("data.max_bad_fraction=0.1", "evaluate.probes=[few_shot]", "probe.shots=[11]", "batch_size=8"),
    )
    train_here(tmp_path / "run", *overrides)
    listed = (tmp_path / "run/failures/bad_images.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in listed]
    wanted = [("train", 23, f"{tmp_path}/images/train/b/11.png")]
    assert [(row["split"], row["id"], row["name"]) for row in found] == wanted


def test_the_training_split_is_not_classified_by_itself(tmp_path):
    both = "evaluate.splits=[test,train]"
    found = train_here(tmp_path, "mesh.data=8", *PROBED, both, "evaluate.probes=[knn]", "total_steps=1")
    assert [row["split"] for row in probed(found)] == [
        *("train/evaluated", "train/evaluated/ema", "test/knn/1", "test/knn/20"),
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.every_steps=0"], "evaluate.probes: nothing is evaluated; set evaluate.every_steps or evaluate.eve"),
        (["evaluate.splits=[train]"], "evaluate.probes: the only split of evaluate.splits is train; add another, such"),
        (["evaluate.probes=[kmn]"], "evaluate.probes[0]: 'kmn' is none of knn, few_shot, linear (did you mean knn?)"),
        (["probe.k=[20,1438]"], "probe.k: 1438, but there are 1437 training examples; take 1437 at most"),
        (["probe.shots=[1000]"], "probe.shots: 1000, but class '9' has 133 training examples; take 133 at most"),
        (["probe.k=[]"], "probe.k: is empty; give at least one number"),
        (["probe.l2=[0.1,0]"], "probe.l2[1]: must be above 0, found 0"),
    ],
)
def test_what_cannot_be_probed_is_refused_before_anything_is_written(overrides, message, tmp_path):
    with pytest.raises(ConfigError, match="^" + re.escape(message)):
        train(settings("mesh.data=1", *PROBED, *overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_probe_of_one_class_is_refused_before_anything_is_written(tmp_path):
    asked = settings("mesh.data=1", *PROBED)
    asked = dataclasses.replace(asked, data=dataclasses.replace(asked.data, classes=("3",)))
    with pytest.raises(ConfigError, match="^probe: the 135 training examples are all of class '3'; a probe needs two"):
        train(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()

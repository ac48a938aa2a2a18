"""Two processes probe features as one does: each searches for the neighbours of its half of the test split."""

import sys

import pytest
from system import NOTHING_RANDOM, as_two, rows, run

from vit_dist.probe import probe

PROBED = (
    *("total_steps=4", "evaluate.every_steps=4", "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"),
    *("evaluate.probes=[knn,few_shot,linear]", *NOTHING_RANDOM),
)


def test_rows_and_the_verb_of_two_processes_are_those_of_one(tmp_path):
    first, second = as_two(tmp_path, *PROBED)
    assert (first.wait(), second.wait()) == (0, 0), first.said()[-3000:] + second.said()[-3000:]
    in_run = {row["split"]: row for row in rows(tmp_path / "run")}
    launch = (sys.executable, "-m", "vit_dist", "launch", "--processes=2", "--devices-per-process=4", "--")
    code, two = run([*launch, "probe", f"--workdir={tmp_path / 'run'}"], tmp_path / "launched")
    assert code == 0, two.said()[-3000:]
    one = probe(tmp_path / "run", overrides=["fake_devices=8"])  # here
    assert two.result() == one
    assert list(one["probes"]) == ["knn/20", "few_shot/10", "linear"]
    for name, row in one["probes"].items():
        assert in_run[f"test/{name}"]["top1"] == pytest.approx(row["top1"])

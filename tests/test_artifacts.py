"""What a run leaves behind opens in other people's tools, with nothing of ours."""

import math

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from system import NOTHING_RANDOM, rows, settings, train_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    train_here(folder, "total_steps=4", "evaluate.every_steps=4", "ema_decay=0.9", *NOTHING_RANDOM)
    return folder


def test_plain_orbax_opens_the_checkpoint(workdir):
    trees = ocp.load_checkpointables(workdir / "checkpoints" / "4")
    assert set(trees) == {"step", "parameters", "optimizer", "ema"}
    assert int(trees["step"]) == 4
    width = settings().model.width
    assert np.asarray(trees["parameters"]["head"]["kernel"]).shape == (width, 10)
    assert np.asarray(trees["ema"]["blocks"]["mlp"]["up"]["kernel"]).shape == (2, width, settings().model.mlp)


def test_tensorboards_reader_finds_every_row_of_the_run(workdir):
    reader = EventAccumulator(str(workdir / "tensorboard"))
    reader.Reload()
    losses = {event.step: event.value for event in reader.Scalars("train/loss")}
    written = {row["step"]: row["loss"] for row in rows(workdir) if row["split"] == "train"}
    assert losses.keys() == written.keys() == {1, 2, 3, 4}
    assert all(math.isclose(losses[step], written[step], rel_tol=1e-6) for step in written)
    assert [event.step for event in reader.Scalars("test/ema/top1")] == [4]

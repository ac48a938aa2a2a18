"""The figures of `bench`: that they are there, and that they fit each other."""

import contextlib
import io
import json
from pathlib import Path

import pytest

from vit_dist import bench, cli, recipes
from vit_dist.config import ConfigError

SMALLEST = Path(__file__).parent / "helpers" / "smallest.py"
KEYS = ("images_per_second", "step_ms", "mfu", "data_wait_fraction", "first_step_seconds", "python_ms")


@pytest.fixture(scope="module")
def found() -> dict:
    """What the command prints: one object, and nothing else."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["bench", f"--config={SMALLEST}", "--steps=5"]) == 0
    return json.loads(out.getvalue())


def test_the_keys_that_scripts_rely_on_are_there(found):
    assert [key for key in KEYS if key not in found] == []


def test_rate_and_step_time_are_the_same_measurement(found):
    assert found["images_per_second"] == pytest.approx(16 / (found["step_ms"] / 1000))
    assert found["batch_size"] == 16 and found["devices"] == 1 and found["mesh"] == {"data": 1}


def test_compilation_is_in_the_first_step_and_the_shares_are_shares(found):
    assert found["first_step_seconds"] > found["step_ms"] / 1000
    assert 0 <= found["data_wait_fraction"] <= 1
    assert 0 < found["python_ms"]
    assert found["mfu"] is None  # of a CPU no peak is known


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_to_measure_are_refused(steps):
    with pytest.raises(ConfigError, match=f"steps: must be above 0, found {steps}"):
        bench(recipes.load(SMALLEST), steps=steps)


def test_a_bad_config_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="data.path: not set"):
        bench(recipes.load(SMALLEST, ["data.source=folder"]))

"""A run whose newest checkpoint is damaged: a resume passes over it, and every other verb refuses it in one line."""

import json
import shutil

import cv2
import numpy as np
import pytest
from system import NOTHING_RANDOM, as_two, assert_same_run, checkpoint_steps, settings, train_here

import vit_dist
from vit_dist import cli
from vit_dist.config import ConfigError

STEPS = 6
RUN = (
    *(f"total_steps={STEPS}", "checkpoint.every_steps=2", "checkpoint.keep_last=3", "evaluate.every_steps=3"),
    *("ema_decay=0.9", "mesh.data=-1", *NOTHING_RANDOM),
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A complete run with the steps 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    train_here(workdir, *RUN)
    assert checkpoint_steps(workdir) == [2, 4, 6]
    return workdir


def flip(folder, tree):
    """Flips a bit in what holds the numbers of a tree."""
    (data,) = (folder / tree / "ocdbt.process_0" / "d").iterdir()
    content = bytearray(data.read_bytes())
    content[1000] ^= 2
    data.write_bytes(content)


@pytest.fixture
def killed(undisturbed, tmp_path):
    """The run as if it had been killed just before it saved step 6."""
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "6")
    (workdir / "summary.json").unlink()
    return workdir


def test_a_resumed_run_sets_the_damaged_step_aside_and_ends_as_if_nothing_had_been(killed, undisturbed, caplog):
    flip(killed / "checkpoints" / "4", "optimizer")
    train_here(killed, *RUN)
    assert_same_run(killed, undisturbed, STEPS, *RUN)
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == ["2", "4", "6", "corrupt-4"]
    (line,) = [record.message for record in caplog.records if "damaged" in record.message]
    assert line.startswith(f"{killed}/checkpoints/4: damaged: tensor optimizer/")
    assert line.endswith("; set aside as corrupt-4, going on from step 2")


@pytest.mark.slow
def test_all_processes_of_a_job_go_on_from_the_same_older_step(tmp_path):
    first, second = as_two(tmp_path, *RUN)
    assert (first.process.returncode, second.process.returncode) == (0, 0), first.said() + second.said()
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    (tmp_path / "run" / "summary.json").unlink()
    flip(tmp_path / "run" / "checkpoints" / "4", "parameters")
    first, second = as_two(tmp_path, *RUN)
    assert (first.process.returncode, second.process.returncode) == (0, 0), first.said() + second.said()
    assert (first.said() + second.said()).count("set aside as corrupt-4, going on from step 2") == 1
    assert_same_run(tmp_path / "run", tmp_path / "whole", STEPS, *RUN)


@pytest.fixture
def damaged(undisturbed, tmp_path):
    """The run with a damaged average in step 6."""
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    flip(workdir / "checkpoints" / "6", "ema")
    return workdir


def test_every_other_verb_refuses_it_and_names_the_newest_that_is_whole(damaged, tmp_path):
    cv2.imwrite(str(image := tmp_path / "image.png"), np.zeros((8, 8), np.uint8))
    verbs = {
        "evaluate": lambda: vit_dist.evaluate(damaged),
        "evaluate of a step": lambda: vit_dist.evaluate(damaged, step=6),
        "predict": lambda: vit_dist.predict(damaged, [image]),
        "load": lambda: vit_dist.load(damaged),
        "features": lambda: vit_dist.features(damaged, tmp_path / "features.npz"),
        "probe": lambda: vit_dist.probe(damaged),
        "export": lambda: vit_dist.export(damaged, tmp_path / "exported", "safetensors"),
        "init.weights": lambda: vit_dist.train(settings(*RUN, f"init.weights={damaged}"), tmp_path / "new"),
    }
    before = sorted(path.name for path in tmp_path.iterdir())
    for verb, call in verbs.items():
        with pytest.raises(ConfigError) as caught:
            call()
        message = str(caught.value)
        assert message.startswith(f"{damaged}/checkpoints/6: damaged: tensor ema/"), (verb, message)
        assert message.endswith("; the newest step that is whole is 4: name it by step"), (verb, message)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert vit_dist.predict(damaged, [image], step=4)[0]["classes"]
    assert vit_dist.predict(damaged, [image], overrides={"checkpoint.verify": False})[0]["classes"]


def listed(capsys, workdir, *options):
    code = cli.main(["checkpoints", f"--workdir={workdir}", *options])
    return code, capsys.readouterr()


def test_checkpoints_are_listed_verified_and_pruned(damaged, capsys):
    shutil.copytree(damaged / "checkpoints" / "2", damaged / "checkpoints" / "corrupt-1")
    (damaged / "checkpoints" / "8.orbax-checkpoint-tmp").mkdir()
    code, shown = listed(capsys, damaged, "--json", "--verify")
    found = {row["name"]: (row["step"], row["digests"], row["state"]) for row in json.loads(shown.out)}
    assert found == {
        "2": (2, True, "whole"),
        "4": (4, True, "whole"),
        "6": (6, True, "damaged"),
        "8.orbax-checkpoint-tmp": (None, None, "being saved"),
        "corrupt-1": (None, None, "set aside"),
    }
    assert (code, shown.err) == (2, f"error: {damaged}/checkpoints: damaged: 6\n")
    code, shown = listed(capsys, damaged, "--prune")
    lines = [line.split() for line in shown.out.splitlines()]
    assert lines[0] == ["checkpoint", "bytes", "metrics", "digests", "state"]
    assert [line[0] for line in lines[1:]] == ["2", "4", "6", "8.orbax-checkpoint-tmp", "corrupt-1"]
    assert lines[1][-2:] == ["not", "verified"] and lines[-1][-1] == "removed"
    assert sorted(path.name for path in (damaged / "checkpoints").iterdir()) == [
        "2",
        "4",
        "6",
        "8.orbax-checkpoint-tmp",
    ]


def test_what_an_interrupted_save_left_long_ago_is_removed(undisturbed, tmp_path, capsys, monkeypatch):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    (workdir / "checkpoints" / "8.orbax-checkpoint-tmp" / "ema").mkdir(parents=True)
    monkeypatch.setattr("vit_dist.checkpoint_list._IDLE_SECONDS", -1)
    code, shown = listed(capsys, workdir, "--json", "--verify", "--prune")
    assert (code, [row["state"] for row in json.loads(shown.out)]) == (0, ["whole", "whole", "whole", "removed"])
    assert checkpoint_steps(workdir) == [2, 4, 6]
    assert len(list((workdir / "checkpoints").iterdir())) == 3


def test_a_folder_without_checkpoints_has_none_to_list(tmp_path, capsys):
    code, shown = listed(capsys, tmp_path)
    assert (code, shown.err) == (
        2,
        f"error: {tmp_path}/checkpoints: no checkpoints here; give the workdir of a run that has saved one\n",
    )

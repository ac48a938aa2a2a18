"""Every verb on workdirs with a damaged file: it does its work, or names the file in one line and ends with 2."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from vit_dist import cli, recipes
from vit_dist.train import train

SMALLEST = str(Path(__file__).parent / "helpers" / "smallest.py")
BRACKETS = b"[" * 100_000
ROW = {"step": 1, "split": "train", "id": 1, "name": "a", "reason": "b"}
SUMMARY = {"step": 2, "count": 360, "loss": 1, "top1": 1, "seconds": 1, "workdir": "a"}


def pipe(file):
    os.mkfifo(file)


def folder(file):
    file.mkdir()
    (file / "x").write_text("")


def edited(**changes):
    """The run's own config with other values in its section `model`, or in itself."""

    def edit(file):
        values = json.loads(file.with_name("before").read_text())
        for key, value in changes.items():
            (values if key in values else values["model"])[key] = value
        file.write_text(json.dumps(values))

    return edit


COMMON = (b"", b"3\n", b"null\n", b"{}\n", b"[]\n", b"[1]\n", BRACKETS, b"\xff\xfe\n", b"1" * 5000, pipe, folder)
DAMAGE = {
    "config.json": [
        *COMMON, {"total_steps": 1e400}, edited(num_classes=None), edited(total_steps=None), edited(num_classes="x"),
        edited(scan="auto"), edited(width=10**12), edited(depth=2), edited(channels=7), edited(ema_decay=0.5),
    ],
    "summary.json": [*COMMON, SUMMARY | {"step": "x"}, SUMMARY | {"seconds": 1e400}, SUMMARY | {"loss": "x"}],
    "environment.json": [
        *COMMON, None, [{}], [{"data": 3}], [{"data": {"train": 3}}], [{"data": {}, "weights": 3}],
        b'[{"data": {}, "x": ' + b"[" * 900 + b"]" * 900 + b"}]",
    ],
    "classes.json": [
        *COMMON, None, [1, 2], [f"c{number}" for number in range(11)], b'["\\ud800"]', [None],
        ["\x1b[2J\nerror: forged"] * 10,
    ],
    "metrics.jsonl": [
        *COMMON, None, b'{"step": "x", "split": "a"}\n', b'{"step": 1}\n', b'{"step": 1, "split": "a", "loss": "x"}\n',
        b'{"step": 2, "split": "test", "loss": null, "top1": null, "count": 3}\n', b'{"step": 1e999, "split": "a"}\n',
        b'{"step": 2, "split": "$\\\\frac$", "loss": 1.0, "top1": 0.5, "count": 3}\n',
        b'{"step": 1, "split": "a", "loss": ' + b"1" * 400 + b"}\n",
    ],
    "failures/bad_images.jsonl": [*COMMON, ROW | {"id": "x"}, ROW | {"split": 3}, ROW | {"reason": None}],
    "failures": [b"no folder"],
    "checkpoints": [b"no folder"],
    "tensorboard": [b"no folder"],
    "curves.svg": [folder],
}  # fmt: skip
VERBS = ("finished", "resumed", "eval", "predict", "export", "features", "probe")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("damaged") / "run"
    train(recipes.load(SMALLEST), workdir)
    return workdir


@pytest.fixture
def used(trained, tmp_path, capsys):
    """Runs a verb on a copy of the run in which a file holds something else: its exit code and its `error:` line."""

    def run(verb, name, damage):
        workdir = tmp_path / "run"
        for left in tmp_path.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        shutil.copytree(trained, workdir)
        file = workdir / name
        if name == "config.json":
            shutil.copy(file, file.with_name("before"))
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.parent.mkdir(exist_ok=True)
        if callable(damage):
            damage(file)
        elif damage is not None:
            file.write_bytes(damage if isinstance(damage, bytes) else json.dumps(damage).encode())
        cv2.imwrite(f"{tmp_path}/a.png", np.zeros((8, 8), np.uint8))
        words = {
            "finished": ["train", f"--config={SMALLEST}"],
            "resumed": ["train", f"--config={SMALLEST}", "--config.total_steps=3"],
            "predict": ["predict", f"{tmp_path}/a.png"],
            "export": ["export", "--format=safetensors", f"{tmp_path}/out"],
            "features": ["features", "--split=test", f"{tmp_path}/f.npz"],
            "probe": ["probe", "--probes=knn"],
        }.get(verb, [verb])
        capsys.readouterr()
        code = cli.main([*words, f"--workdir={workdir}"])
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error:")]
        assert (code, len(errors)) in ((0, 0), (2, 1)), err[-2000:]
        assert set(map(str.isprintable, (out + err).replace("\n", ""))) <= {True}
        assert code == 0 or (str(workdir) in errors[0] or "model.channels: 7" in errors[0]), errors
        return code, "".join(errors)

    return run


@pytest.mark.parametrize(
    ("verb", "name", "damage"),
    [
        ("finished", "summary.json", b"{}"),
        ("finished", "environment.json", b"[1]"),
        ("resumed", "metrics.jsonl", b'{"split": "train"}\n'),
        ("resumed", "failures/bad_images.jsonl", BRACKETS),
        ("eval", "config.json", edited(num_classes=None)),
        ("predict", "classes.json", [f"c{number}" for number in range(11)]),
        ("export", "metrics.jsonl", b"3\n"),
        ("export", "environment.json", [{"data": {}, "weights": 3}]),
        ("features", "config.json", edited(width=10**12)),
        ("probe", "classes.json", b"\xff"),
    ],
)
def test_a_verb_that_reads_the_file_refuses_it_by_name(used, verb, name, damage):
    code, error = used(verb, name, damage)
    assert code == 2 and (f"/run/{name}" in error or "by the run's config.json; restore it" in error)


def test_what_a_verb_does_not_read_it_does_not_mind(used):
    assert used("eval", "summary.json", b"{}") == (0, "")
    assert used("predict", "metrics.jsonl", BRACKETS) == (0, "")
    assert used("export", "metrics.jsonl", DAMAGE["metrics.jsonl"][-4])[0] == 0  # a row whose loss was no number


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", DAMAGE)
def test_no_damage_is_told_by_a_traceback(used, verb, name):
    """A quarter of the kinds of damage for each verb, another quarter for the next; all of them take ten minutes."""
    for damage in DAMAGE[name][VERBS.index(verb) % 4 :: 4]:
        used(verb, name, damage)

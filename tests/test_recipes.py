"""Recipes: found by path or by name, and Python programs like any other."""

import math
import os
import re
import shutil
import subprocess
import sys
import textwrap

import cv2
import numpy as np
import pytest
from system import ROOT, rows

import vit_dist
from vit_dist import evaluate, predict, recipes, train
from vit_dist.config import ConfigError
from vit_dist.configs import digits
from vit_dist.data.sets.index import cache_folder


def written(folder, name, text):
    """A recipe `folder/name.py` of this text."""
    file = folder / f"{name}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(textwrap.dedent(text))
    return file


SMALL = """
    from vit_dist.config import default_config
    def get_config():
        config = default_config()
        config.total_steps, config.batch_size = 3, {batch}
        return config
    """


def test_a_recipe_is_found_by_its_path_then_in_the_folder_configs_then_among_the_packages_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert recipes.load("digits").batch_size == 96 == recipes.load("digits.py").batch_size
    written(tmp_path / "configs", "digits", SMALL.format(batch=7))
    assert recipes.load("digits").batch_size == 7
    here = written(tmp_path, "digits", SMALL.format(batch=5))
    assert recipes.load("digits.py").batch_size == recipes.load(here).batch_size == 5
    monkeypatch.setenv("HOME", str(tmp_path))
    assert recipes.load("~/digits.py").batch_size == 5
    with pytest.raises(ConfigError, match=r"^digit: no such config file \(did you mean digits\?\)$"):
        recipes.load("digit")
    with pytest.raises(ConfigError, match="^configs: is a folder, not a config file"):
        recipes.load("configs")


def test_a_recipe_may_import_one_beside_it_or_one_of_the_packages_own(tmp_path):
    written(tmp_path, "base_of_mine", SMALL.format(batch=11))
    written(
        tmp_path,
        "mine",
        """
        import base_of_mine
        from vit_dist.configs import digits
        def get_config():
            config = base_of_mine.get_config()
            config.log_every = digits.get_config().batch_size
            return config
        """,
    )
    found = recipes.load(tmp_path / "mine.py")
    assert (found.batch_size, found.log_every) == (11, 96)


def test_recipes_of_two_folders_import_the_neighbours_of_their_own(tmp_path):
    for batch in (11, 12):
        written(tmp_path / str(batch), "base_of_mine", SMALL.format(batch=batch))
        written(tmp_path / str(batch), "mine", "from base_of_mine import get_config")
    assert [recipes.load(tmp_path / f"{batch}/mine.py").batch_size for batch in (11, 12)] == [11, 12]


def test_a_recipe_may_have_dataclasses_and_annotations_that_are_texts(tmp_path):
    written(
        tmp_path,
        "modern",
        """
        from __future__ import annotations
        import dataclasses
        from vit_dist.config import default_config
        @dataclasses.dataclass
        class Sizes:
            batch: int = 13
        def get_config():
            config = default_config()
            config.total_steps, config.batch_size = 1, Sizes().batch
            return config
        """,
    )
    assert recipes.load(tmp_path / "modern.py").batch_size == 13


def test_a_file_without_get_config_is_said(tmp_path):
    file = written(tmp_path, "empty", "x = 1")
    with pytest.raises(ConfigError, match="defines no get_config"):
        recipes.load(file)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lr", "optimizer.learning_rate"),
        ("learning_rate", "optimizer.learning_rate"),
        ("epochs", "total_epochs"),
        ("batch", "batch_size"),
        ("workers", "data.workers"),
        ("model.weight_decay", "optimizer.weight_decay"),
    ],
)
def test_a_key_that_lies_elsewhere_or_has_a_longer_name_is_suggested(word, meant):
    with pytest.raises(ConfigError, match=f"unknown key {word} \\(did you mean {meant}\\?\\)"):
        recipes.load("digits", [f"{word}=1"])


def test_a_config_is_made_from_a_name_a_file_another_config_and_keys_with_values():
    wanted = recipes.load("digits", ["batch_size=64", "model.depth=3", "mesh.data=1"])
    changes = {"batch_size": 64, "model": {"depth": 3}, "mesh.data": 1}
    assert recipes.load_config("digits", changes) == wanted
    assert recipes.load_config(recipes.load("digits"), changes) == wanted
    assert recipes.load_config(digits.get_config(), ["batch_size=64", "model.depth=3", "mesh.data=1"]) == wanted
    assert recipes.load_config(wanted) is wanted


@pytest.mark.parametrize(
    ("config", "overrides", "said"),
    [
        (7, (), "config: expected a recipe's name or file, or a config, found int"),
        ("digits", "batch_size=64", "overrides: expected a list such as"),
        ("digits", {"batch_size": "many"}, "batch_size: expected a whole number, found 'many'"),
        ("digits", {"batchsize": 64}, "unknown key batchsize .did you mean batch_size"),
    ],
)
def test_arguments_that_are_wrong_are_said_as_what_they_are(config, overrides, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        train(config, tmp_path / "run", overrides)
    assert not (tmp_path / "run").exists()


def test_six_lines_of_a_notebook(tmp_path):
    lines = """
        import vit_dist
        small = {"total_steps": 2, "batch_size": 64, "fake_devices": 1, "evaluate.every_steps": 0, "model.depth": 1}
        summary = vit_dist.train("digits", "run", small)
        found = vit_dist.evaluate("run")
        print(summary["step"], found["count"])
        help(vit_dist)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(lines)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "2 360\n" in done.stdout
    for name in vit_dist.__all__:
        assert re.search(rf"^    {name}  +\S", done.stdout, re.MULTILINE), name


@pytest.mark.parametrize(("batch", "epochs"), [(4, 3), (1, 1.5)])
def test_own_images_end_at_a_rate_of_zero_however_many_there_are(batch, epochs, tmp_path, monkeypatch):
    """The schedule's zero is one step after the last: steps T - 1 of T have (1 + cos(pi (T - 1 - w) / (T - w))) / 2."""
    monkeypatch.setenv("HOME", str(tmp_path))
    generator = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 3)):
        for number in range(count):
            file = tmp_path / "images" / split / ("cat", "dog")[number % 2] / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(file), generator.integers(0, 255, (40, 30, 3), np.uint8))
    tiny = {"model.variant": "mu/16", "model.image_size": 32, "model.dtype": "float32", "model.depth": 1}
    lengths = {"total_epochs": epochs, "optimizer.warmup_epochs": 0.4, "batch_size": batch, "log_every": 1}
    summary = train("own_images", "~/run", {**tiny, **lengths, "data.path": "~/images", "mesh.data": 1})
    steps = math.ceil(10 * epochs / batch)
    warmup = math.ceil(4 / batch)
    last = 1 + math.cos(math.pi * (steps - 1 - warmup) / (steps - warmup))
    trained = [row for row in rows(tmp_path / "run") if row["split"] == "train"]
    assert summary["step"] == steps == trained[-1]["step"] and summary["count"] == 3
    assert trained[warmup]["learning_rate"] == pytest.approx(5e-4)
    assert trained[-1]["learning_rate"] == pytest.approx(5e-4 * last / 2, rel=1e-4)
    assert evaluate("~/run")["count"] == 3
    assert len(predict("~/run", ["~/images/test/cat/0.jpg"])) == 1


def test_every_path_of_a_config_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for data in ({"source": "folder", "path": "~/none"}, {"mixture": [{"source": "folder", "path": "~/none"}]}):
        with pytest.raises(ConfigError, match=f"no such file or folder: {tmp_path}/none"):
            train("digits", "~/run", {"data": data})
    assert cache_folder("~/cache") == tmp_path / "cache"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_wheel_has_the_recipes_by_name(tmp_path):
    source = shutil.copytree(ROOT, tmp_path / "source", ignore=shutil.ignore_patterns(".*", "build", "runs", "tests"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path / "wheels"), "."]
    subprocess.run(pip, cwd=source, check=True)  # not in the checkout, where it would leave a folder `build`
    (wheel,) = (tmp_path / "wheels").glob("vit_dist-*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(tmp_path / "site")], check=True)
    assert (tmp_path / "site/vit_dist/py.typed").exists() and not (tmp_path / "site/configs").exists()
    assert (tmp_path / "site/vit_dist/plan/plan.html.jinja").exists()
    (tmp_path / "empty").mkdir()
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from vit_dist import recipes, configs; "
    code += "from vit_dist.configs import digits; print(recipes.load('digits').batch_size, configs.FOLDER)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "empty", capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["96", str(tmp_path / "site/vit_dist/configs")]

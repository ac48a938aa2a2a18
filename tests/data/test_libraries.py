"""Libraries that only some data need: all else does without them, and whoever needs one is told its name."""

import json
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from vit_dist.config import ConfigError
from vit_dist.data import libraries
from vit_dist.data.libraries import Library

ROOT = Path(__file__).parents[2]
HIDDEN = ("cv2", "simplejpeg", "pyarrow", "sklearn", "tensorflow_datasets", "nvidia")
# A process in which none of them can be imported; it runs one command line after another.
PROCESS = f"""
import contextlib, importlib.abc, io, json, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
from vit_dist.cli import main

for words in json.loads(sys.argv[1]):
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(words)
    said = [line for line in errors.getvalue().splitlines() if line.startswith(("error: ", "Traceback"))]
    print(json.dumps([code, said, output.getvalue().splitlines()]))
"""


class Command(NamedTuple):
    """What came of one: its exit code, the lines of stderr that speak of an error, and the lines of stdout."""

    code: int
    errors: list[str]
    printed: list[str]


def _without_libraries(**commands: list[str]) -> dict[str, Command]:
    """Runs them in one process."""
    words = [sys.executable, "-c", PROCESS, json.dumps(list(commands.values()))]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    return {name: Command(*json.loads(line)) for name, line in zip(commands, ended.stdout.splitlines(), strict=True)}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    """What came of commands in a process that has none of the libraries; the first four need none."""
    place = tmp_path_factory.mktemp("sets")
    draw = np.random.default_rng(0)
    arrays = {f"x_{split}": draw.integers(0, 256, (32, 8, 8), np.uint8) for split in ("train", "test")}
    np.savez(place / "set.npz", **arrays, **{f"y_{split}": np.arange(32) % 10 for split in ("train", "test")})
    for suffix in ("png", "jpeg"):
        folder = place / suffix / "train" / "cat"
        folder.mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.{suffix}")
    (place / "train.parquet").write_bytes(b"PAR1")
    smallest, dest = "--config=tests/helpers/smallest.py", str(place / "made")
    pixels = [
        smallest,
        "--config.data.source=npz",
        f"--config.data.path={place / 'set.npz'}",
        "--config.data.flip=true",
    ]
    files = [smallest, "--config.data.source=folder", "--config.model.channels=3"]
    return _without_libraries(
        train=["train", *pixels, f"--workdir={place / 'run'}"],
        eval=["eval", f"--workdir={place / 'run'}"],
        bench=["bench", *pixels, "--steps=2"],
        plan=["plan", *pixels, "--target=cpu:1", "--json"],
        resize=["prepare", str(place / "png"), dest, "--resize=4"],
        augment=["bench", *files, f"--config.data.path={place / 'png'}", "--config.data.erase=1"],
        jpeg=["prepare", str(place / "jpeg"), f"{dest}-jpeg", "--resize=4"],
        crop_decode=["bench", *files, f"--config.data.path={place / 'jpeg'}", "--config.data.crop_decode=true"],
        parquet=["prepare", str(place / "train.parquet"), dest, "--source=parquet"],
        digits=["prepare", dest, "--source=digits"],
        tfds=["prepare", "cifar10", dest, "--source=tfds"],
    )


def test_training_planning_and_measuring_sets_in_memory_need_none_of_them(done: dict[str, Command]) -> None:
    results = {name: done[name] for name in ("train", "eval", "bench", "plan")}
    assert {name: (one.code, one.errors) for name, one in results.items()} == dict.fromkeys(results, (0, []))
    trained, evaluated, measured, planned = (json.loads(one.printed[-1]) for one in results.values())
    assert trained["step"] == 2 and evaluated["count"] == 32
    assert measured["images_per_second"] > 0 and planned["fits"] is True


IMAGES = "resizing or augmenting images on the host needs opencv-python-headless"


@pytest.mark.parametrize(
    ("name", "needed", "remedy"),
    [
        ("resize", IMAGES, "pip install opencv-python-headless"),
        ("augment", IMAGES, "pip install opencv-python-headless"),
        ("jpeg", "reading or writing JPEG files needs simplejpeg", "pip install simplejpeg"),
        ("parquet", "data.source=parquet needs pyarrow", "pip install pyarrow"),
        ("digits", "data.source=digits needs scikit-learn", "pip install scikit-learn"),
        ("tfds", "data.source=tfds needs tensorflow-datasets", "pip install 'vit-dist[tfds]'"),
        (
            "crop_decode",
            "data.crop_decode needs nvidia-nvimgcodec-cu13",
            "pip install 'vit-dist[crop-decode]', or set it to False",
        ),
    ],
)
def test_one_that_is_missing_is_named_in_one_line_with_what_needs_it(done, name, needed, remedy) -> None:
    assert done[name].code == 2
    (error,) = done[name].errors
    start, end = error.split(" (No module named ")
    assert start == f"error: {needed}, which is not installed" and end.partition("); ")[2] == remedy


def _module(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "slow_library.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "slow_library", raising=False)


def test_many_threads_may_be_the_first_to_use_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(tmp_path, monkeypatch, "import time; time.sleep(0.2); readied = []; answer = 42")
    library = Library("slow_library", "slow", "a test", then=lambda module: (time.sleep(0.1), module.readied.append(1)))
    start, found = threading.Barrier(16), []

    def use() -> None:
        start.wait()
        found.append((library.answer, list(library.readied)))

    threads = [threading.Thread(target=use) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(42, [1])] * 16


def test_once_used_it_is_a_plain_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(tmp_path, monkeypatch, "def call(): return 1")
    library = Library("slow_library", "slow", "a test")
    assert "slow_library" not in sys.modules and not hasattr(library, "__path__")
    assert library.call() == 1
    assert type(library) is types.ModuleType and library.call is sys.modules["slow_library"].call
    with pytest.raises(AttributeError, match="no attribute 'cal'"):
        library.cal  # noqa: B018


def test_one_that_is_broken_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(tmp_path, monkeypatch, "raise ImportError('libGL.so.1: cannot open shared object file')")
    library = Library("slow_library", "slow", "a test")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"a test needs slow, which cannot be imported \(libGL.so.1: .*\); pip"):
            libraries.load(library)


def test_opencv_keeps_to_one_thread() -> None:
    assert libraries.cv2.getNumThreads() == 1

"""Libraries that only some data need: the rest works without them, and an error names the missing one."""

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
    errors_printed = [line for line in errors.getvalue().splitlines() if line.startswith(("error: ", "Traceback"))]
    print(json.dumps([code, errors_printed, output.getvalue().splitlines()]))
"""


class Command(NamedTuple):
    """The result of a command: its exit code, the lines of stderr that are errors, and the lines of stdout."""

    code: int
    errors: list[str]
    printed: list[str]


def _without_libraries(**commands: list[str]) -> dict[str, Command]:
    """Runs the commands in a process that has none of the libraries."""
    words = [sys.executable, "-c", PROCESS, json.dumps(list(commands.values()))]
    ended = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=True)
    return {name: Command(*json.loads(line)) for name, line in zip(commands, ended.stdout.splitlines(), strict=True)}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Command]:
    """The results of commands without the libraries; the first four need none."""
    root = tmp_path_factory.mktemp("sets")
    draw = np.random.default_rng(0)
    arrays = {f"x_{split}": draw.integers(0, 256, (32, 8, 8), np.uint8) for split in ("train", "test")}
    np.savez(root / "set.npz", **arrays, **{f"y_{split}": np.arange(32) % 10 for split in ("train", "test")})
    for suffix in ("png", "jpeg"):
        folder = root / suffix / "train" / "cat"
        folder.mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.{suffix}")
    (root / "train.parquet").write_bytes(b"PAR1")
    smallest, dest = "--config=tests/helpers/smallest.py", str(root / "made")
    pixels = [
        smallest,
        "--config.data.source=npz",
        f"--config.data.path={root / 'set.npz'}",
        "--config.data.flip=true",
    ]
    files = [smallest, "--config.data.source=folder", "--config.model.channels=3"]
    return _without_libraries(
        train=["train", *pixels, f"--workdir={root / 'run'}"],
        eval=["eval", f"--workdir={root / 'run'}"],
        bench=["bench", *pixels, "--steps=2"],
        plan=["plan", *pixels, "--target=cpu:1", "--json"],
        resize=["prepare", str(root / "png"), dest, "--resize=4"],
        augment=["bench", *files, f"--config.data.path={root / 'png'}", "--config.data.erase=1"],
        jpeg=["prepare", str(root / "jpeg"), f"{dest}-jpeg", "--resize=4"],
        crop_decode=["bench", *files, f"--config.data.path={root / 'jpeg'}", "--config.data.crop_decode=true"],
        parquet=["prepare", str(root / "train.parquet"), dest, "--source=parquet"],
        digits=["prepare", dest, "--source=digits"],
        tfds=["prepare", "cifar10", dest, "--source=tfds"],
    )


def test_training_planning_and_measuring_sets_in_memory_need_none_of_them(done: dict[str, Command]) -> None:
    results = {name: done[name] for name in ("train", "eval", "bench", "plan")}
    assert {name: (result.code, result.errors) for name, result in results.items()} == dict.fromkeys(results, (0, []))
    trained, evaluated, measured, planned = (json.loads(result.printed[-1]) for result in results.values())
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
def test_a_missing_library_is_named_in_one_line_with_what_needs_it(done, name, needed, remedy) -> None:
    assert done[name].code == 2
    (error,) = done[name].errors
    start, end = error.split(" (No module named ")
    assert start == f"error: {needed}, which is not installed" and end.partition("); ")[2] == remedy


def _module(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (folder / "slow_library.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "slow_library", raising=False)


def test_many_threads_can_use_a_library_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(tmp_path, monkeypatch, "import time; time.sleep(0.2); readied = []; answer = 42")
    library = Library(
        "slow_library", "slow", "a test", after_import=lambda module: (time.sleep(0.1), module.readied.append(1))
    )
    start, results = threading.Barrier(16), []

    def use() -> None:
        start.wait()
        results.append((library.answer, list(library.readied)))

    threads = [threading.Thread(target=use) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [(42, [1])] * 16


def test_a_used_library_is_a_plain_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(tmp_path, monkeypatch, "def call(): return 1")
    library = Library("slow_library", "slow", "a test")
    assert "slow_library" not in sys.modules and not hasattr(library, "__path__")
    assert library.call() == 1
    assert type(library) is types.ModuleType and library.call is sys.modules["slow_library"].call
    with pytest.raises(AttributeError, match="no attribute 'cal'"):
        library.cal  # noqa: B018


def test_the_error_of_a_broken_library_holds_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(tmp_path, monkeypatch, "raise ImportError('libGL.so.1: cannot open shared object file')")
    library = Library("slow_library", "slow", "a test")
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"a test needs slow, which cannot be imported \(libGL.so.1: .*\); pip"):
            libraries.load(library)


def test_opencv_keeps_to_one_thread() -> None:
    assert libraries.cv2.getNumThreads() == 1

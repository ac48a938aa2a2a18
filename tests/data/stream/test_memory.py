"""The loader's memory does not grow while it runs, and its processes and shared memory are gone after it ends."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[3]
PRELUDE = """
import sys
import numpy as np
import psutil
from vit_dist.config import Data
from vit_dist.data.sets.examples import ArraySource
from vit_dist.data.stream.loader import train_batches
from vit_dist.data.sets.sources import open_source

def batches(source, data, size, channels, batch_size, steps):
    return train_batches(source, data, image_size=(size, size), channels=channels, seed=0, batch_size=batch_size,
                         rows=range(0, batch_size), start_step=0, stop_step=steps)

def resident():
    return psutil.Process().memory_info().rss

def growth(batches, settled, steps):
    for number, batch in enumerate(batches, 1):
        if number == settled:
            before = resident()
    assert number == steps
    return resident() - before
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own, so that only the loader's memory is measured."""
    command = [sys.executable, "-c", PRELUDE + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)


def shared_memory() -> set[str]:
    """The blocks of shared memory on this machine. (Python itself warns of semaphores that are left behind.)"""
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """64 JPEG files of many sizes, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(64):
        file = tmp_path / f"set/train/{number % 2}/{number:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(24, 120, 2)
        coarse = rng.integers(0, 256, (5, 6, 3), np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).save(file, quality=80)
    return tmp_path / "set"


@pytest.mark.parametrize("steps", [300, pytest.param(2000, marks=pytest.mark.slow)])
def test_many_decoded_batches_take_no_more_memory_than_100(photos: Path, steps: int) -> None:
    code = """
data = Data(source="folder", path=sys.argv[1], crop_area=(0.1, 1.0), flip=True, color_jitter=0.3, threads=2,
            read_ahead_mb=4)
steps = int(sys.argv[2])
print(growth(batches(open_source(data, "train"), data, 32, 3, 32, steps), 100, steps))
"""
    grown = int(run(code, str(photos), str(steps)).stdout)
    print(f"grown by {grown / 1e6:.1f} MB")
    assert grown < (steps - 100) * 32 * 32 * 32 * 3 / 2  # half of all pixels that were decoded since


def test_20000_batches_from_memory_take_no_more_memory_than_1000() -> None:
    code = """
source = ArraySource(np.zeros((60_000, 28, 28, 1), np.uint8), np.zeros(60_000, np.int32), ("0",))
print(growth(batches(source, Data(), 28, 1, 32, 20_000), 1000, 20_000))
"""
    grown = int(run(code).stdout)
    print(f"grown by {grown / 1e6:.1f} MB")
    assert grown < 50e6


def test_worker_processes_leave_nothing_behind(photos: Path) -> None:
    """Neither processes nor shared memory, nor a complaint about either, whichever way the stream ends."""
    code = """
import multiprocessing
import pathlib

def stream(steps):
    data = Data(source="folder", path=sys.argv[1], workers=2, threads=2, read_ahead_mb=8)
    return batches(open_source(data, "train"), data, 64, 3, 64, steps)

def left(end):
    print(end, len(multiprocessing.active_children()))

if __name__ == "__main__":
    exhausted = stream(4)
    assert len(list(exhausted)) == 4
    left("exhausted")
    closed = stream(40)
    next(closed)
    closed.close()
    left("closed")
    file = pathlib.Path(sys.argv[1], "train/0/10.jpg")
    image = file.read_bytes()
    file.write_bytes(b"")
    raised = stream(40)
    try:
        list(raised)
    except ValueError as error:
        print(error)
    left("raised")
    file.write_bytes(image)
    dropped = stream(40)  # by the end of the program
    next(dropped)
"""
    before = shared_memory()
    script = photos / "script.py"
    script.write_text(PRELUDE + code)
    command = [sys.executable, str(script), str(photos)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stderr) == (0, "")
    exhausted, closed, error, raised = done.stdout.splitlines()
    assert (exhausted, closed, raised) == ("exhausted 0", "closed 0", "raised 0")
    assert "10.jpg" in error
    assert shared_memory() - before == set()

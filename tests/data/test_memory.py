"""The loader's memory stays where it is, however long it runs; and nothing of it stays behind."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PRELUDE = """
import sys
import numpy as np
import psutil
from vit_dist.config import Data
from vit_dist.data.examples import ArraySource
from vit_dist.data.loader import train_batches
from vit_dist.data.sources import open_source

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
    """A process of its own, so that what is measured is the loader's alone."""
    command = [sys.executable, "-c", PRELUDE + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)


def shared_memory() -> set[str]:
    """Its blocks that there are on this machine. (Of semaphores left behind Python itself complains.)"""
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


def test_2000_decoded_batches_take_no_more_memory_than_100(photos: Path) -> None:
    code = """
data = Data(source="folder", path=sys.argv[1], crop_area=(0.1, 1.0), flip=True, color_jitter=0.3, threads=2,
            read_ahead_mb=4)
print(growth(batches(open_source(data, "train"), data, 32, 3, 32, 2000), 100, 2000))
"""
    grown = int(run(code, str(photos)).stdout)
    print(f"grown by {grown / 1e6:.1f} MB")
    assert grown < 50e6


def test_20000_batches_from_memory_take_no_more_memory_than_1000() -> None:
    code = """
source = ArraySource(np.zeros((60_000, 28, 28, 1), np.uint8), np.zeros(60_000, np.int32), ("0",))
print(growth(batches(source, Data(), 28, 1, 32, 20_000), 1000, 20_000))
"""
    grown = int(run(code).stdout)
    print(f"grown by {grown / 1e6:.1f} MB")
    assert grown < 50e6


@pytest.mark.parametrize("read_ahead_mb", [1, 40])
def test_what_is_read_ahead_is_bounded_in_bytes(photos: Path, read_ahead_mb: int) -> None:
    """Batches of 256 images of 128x128 (12.6 MB) wait for a consumer that sleeps."""
    code = """
import time
data = Data(source="folder", path=sys.argv[1], threads=2, read_ahead_mb=float(sys.argv[2]))
stream = batches(open_source(data, "train"), data, 128, 3, 256, 50)
first = next(stream)
before = resident()
while True:
    time.sleep(1.5)  # on a busy machine a stretch of nothing is not yet the end
    now = resident()
    if now - before < 1e6:
        break
    before = now
print(now)
stream.close()
"""
    small, found = (int(run(code, str(photos), str(size)).stdout) for size in (1, read_ahead_mb))
    print(f"{(found - small) / 1e6:.1f} MB more at {read_ahead_mb} MB ahead")
    assert (read_ahead_mb - 1) * 2**20 - 8e6 < found - small < (read_ahead_mb - 1) * 2**20 + 16e6


@pytest.mark.parametrize("end", ["exhausted", "closed", "dropped", "raised"])
def test_worker_processes_leave_nothing_behind(photos: Path, end: str) -> None:
    """Neither processes nor shared memory, nor a complaint about either, whichever way the stream ends."""
    code = """
import multiprocessing
data = Data(source="folder", path=sys.argv[1], workers=2, threads=2, read_ahead_mb=8)
if sys.argv[2] == "raised":
    open(sys.argv[1] + "/train/0/10.jpg", "wb").close()
if __name__ == "__main__":
    stream = batches(open_source(data, "train"), data, 64, 3, 64, 40 if sys.argv[2] != "exhausted" else 4)
    try:
        for number, batch in enumerate(stream):
            if number == 3 and sys.argv[2] in ("closed", "dropped"):
                break
    except ValueError as error:
        print(error)
    if sys.argv[2] == "closed":
        stream.close()
        print(len(multiprocessing.active_children()))
"""
    before = shared_memory()
    script = photos / "script.py"
    script.write_text(PRELUDE + code)
    command = [sys.executable, str(script), str(photos), end]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().splitlines()[-1:] == {"closed": ["0"]}.get(end, done.stdout.strip().splitlines()[-1:])
    assert ("10.jpg" in done.stdout) == (end == "raised")
    assert shared_memory() - before == set()

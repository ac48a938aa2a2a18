"""A run of the real command, killed by -9 and started again, beside one that was not: are they the same to the bit?

Each start compiles for itself, as on a machine without a cache of compiled programs: the promise is of
`deterministic=True` and not of one binary. This process leaves the GPU to the command, and reads the checkpoints on
the CPU.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from visit import golden
from visit.job import Job
from vit_dist import recipes
from vit_dist.job import processes
from vit_dist.program import Program
from vit_dist.run.checkpoints import Checkpoints

RECIPE = Path(__file__).with_name("resume_recipe.py")
# What a row says of the machine and not of the run.
_TIMINGS = ("images_per_second", "images_per_second_per_device", "step_ms", "data_wait_fraction", "mfu", "memory_bytes")


def run(job: Job) -> None:
    """Keeps what both runs have in common, and the memory of the one that was not killed, early and late."""
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"}  # unchanged by `make_fake_devices`
    processes.make_fake_devices(1)
    folder = job.scratch / "resume"
    folder.mkdir()
    data, steps = folder / golden.DATA, job.arguments["steps"]
    golden.write_data(data)
    keys = (f"data.path={data}", f"total_steps={steps}")
    commands = {name: _command(folder / name, keys) for name in ("whole", "killed")}
    subprocess.run(commands["whole"], check=True, env=environment)
    killed_after = _run_and_kill(commands["killed"], environment, folder / "killed", steps)
    job.keep(steps=steps, killed_after=killed_after)
    job.check("the run was killed before its end", killed_after < steps, f"after step {killed_after} of {steps}")
    subprocess.run(commands["killed"], check=True, env=environment)
    whole, resumed = (_rows(folder / name) for name in ("whole", "killed"))
    same = [_of_the_run(row) for row in resumed] == [_of_the_run(row) for row in whole]
    job.check("all rows of the resumed run are the other's", same and len(whole) > 0, f"{len(whole)} rows")
    differing, count = compare(*(_arrays(folder / name, keys) for name in ("whole", "killed")))
    job.check("all arrays of the last checkpoint are the other's to the bit", not differing, f"{count} arrays")
    peaks = [row.get("memory_bytes") for row in whole if row["step"] in (60, 300)]  # after the first checkpoints
    job.keep(rows=len(whole), arrays=count, differing=differing[:5], peak_bytes=peaks)
    early, late = peaks if len(peaks) == 2 else (None, None)
    if early is not None and late is not None:
        claim = "the run's peak of memory after 300 steps is that after 60"
        job.check(claim, late <= early, f"{late:,} and {early:,} bytes")


def compare(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> tuple[list[str], int]:
    """The names of arrays that are not the same to the bit, and how many there are."""
    assert one.keys() == other.keys()
    return [name for name in one if one[name].tobytes() != other[name].tobytes()], len(one)


def _run_and_kill(command: list[str], environment: dict[str, str], workdir: Path, steps: int) -> int:
    """Kills the command some steps after its first checkpoint; returns the last step whose row was written."""
    process = subprocess.Popen(command, env=environment)
    try:
        while process.poll() is None and not (_saved(workdir) and _last_step(workdir) > min(_saved(workdir))):
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return steps if process.returncode == 0 else _last_step(workdir)


def _command(workdir: Path, keys: tuple[str, ...]) -> list[str]:
    words = [f"--config={RECIPE}", f"--workdir={workdir}", *(f"--config.{key}" for key in keys)]
    return [sys.executable, "-m", "vit_dist", "train", *words]


def _rows(workdir: Path) -> list[dict[str, Any]]:
    """The whole rows of a run, which may be under way."""
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _of_the_run(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _TIMINGS}


def _last_step(workdir: Path) -> int:
    return max((row["step"] for row in _rows(workdir)), default=0)


def _saved(workdir: Path) -> list[int]:
    """The steps whose checkpoints are whole."""
    folder = workdir / "checkpoints"
    return [int(one.name) for one in folder.iterdir() if one.name.isdigit()] if folder.is_dir() else []


def _arrays(workdir: Path, keys: tuple[str, ...]) -> dict[str, np.ndarray]:
    """All arrays of the newest checkpoint, by path."""
    settings = recipes.load(RECIPE, keys)
    program = Program(settings, classes=10, steps=1, augment_on_device=True)
    checkpoints = Checkpoints(workdir / "checkpoints", keep_last=1, keep_best=0, read_only=True)
    with program.in_use():
        state = program.abstract_state()
        trees = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        _, found = checkpoints.restore(trees)
    checkpoints.close()
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(found)}

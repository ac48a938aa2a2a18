"""Running the whole system from a test: `train` in this process, or the command in processes of its own.

Everything runs the recipe `tiny.py` beside this file, with overrides such as `mesh.fsdp=8`.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np

from vit_dist import recipes
from vit_dist.job.launcher import free_port
from vit_dist.program import Program
from vit_dist.run.checkpoints import Checkpoints
from vit_dist.run.metrics import read_rows
from vit_dist.train import train

RECIPE = Path(__file__).with_name("tiny.py")
ROOT = RECIPE.parents[2]
DATA = ROOT.parent / "shared" / "data"
NO_DROPOUT = tuple(f"model.{name}=0" for name in ("dropout", "embedding_dropout", "attention_dropout", "drop_path"))
NO_AUGMENTATION = (
    *(f"data.{name}=0" for name in ("rotate", "scale", "shear", "shift")),
    *("data.flip=false", "data.crop_area=null", "mixup=0", "cutmix=0"),
)
NOTHING_RANDOM = (*NO_DROPOUT, *NO_AUGMENTATION)  # a step that compiles in a third of the time
# What a row says of the machine and not of the run.
TIMINGS = {"images_per_second", "images_per_second_per_device", "step_ms", "data_wait_fraction", "mfu", "memory_bytes"}


def settings(*overrides):
    return recipes.load(RECIPE, overrides)


def train_here(workdir, *overrides):
    """Trains in this process, which has eight devices; returns the rows."""
    train(settings(*overrides), workdir)
    return rows(workdir)


def rows(workdir):
    """The rows of a run without their timings."""
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in read_rows(Path(workdir))]


def losses(rows):
    return [row["loss"] for row in rows if row["split"] == "train"]


def examples(rows):
    """The digest of each step's example ids in order."""
    return [row["examples"] for row in rows if row["split"] == "train"]


def largest_difference(found, expected):
    """Of two curves, relative to the second."""
    return float(np.max(np.abs(np.subtract(found, expected)) / np.abs(expected)))


def command(workdir, *overrides):
    return [
        *(sys.executable, "-m", "vit_dist", "train", f"--config={RECIPE}", f"--workdir={workdir}"),
        *(f"--config.{one}" for one in overrides),
    ]


class Running:
    """A command under way; what it prints goes to two files, so that no full pipe can hold it up."""

    def __init__(self, arguments, output, start_new_session=False, **variables):
        self.stdout, self.stderr = output.with_suffix(".stdout"), output.with_suffix(".stderr")
        with open(self.stdout, "w") as out, open(self.stderr, "w") as err:
            environment = {**os.environ, **variables}
            self.process = subprocess.Popen(
                arguments, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=start_new_session
            )

    def wait(self, seconds=300):
        """The exit code."""
        return self.process.wait(seconds)

    def said(self):
        return self.stderr.read_text()

    def result(self):
        """The JSON object on the last line of stdout."""
        return json.loads(self.stdout.read_text().splitlines()[-1])


@contextlib.contextmanager
def started(arguments, output, **variables):
    """A `Running` that does not outlive the test. output: a path that the files of what it prints begin with."""
    running = Running(arguments, output, **variables)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


def run(arguments, output, **variables):
    """A command run to its end: (exit code, the `Running`)."""
    with started(arguments, output, **variables) as running:
        return running.wait(), running


def as_two(folder, *overrides):
    """Two processes of four devices each train into `folder/run` together; returns both, ended."""
    arguments = command(folder / "run", "fake_devices=4", *overrides)
    variables = {"VIT_DIST_COORDINATOR": f"127.0.0.1:{free_port()}", "VIT_DIST_PROCESSES": "2"}
    with (
        started(arguments, folder / "0", VIT_DIST_PROCESS="0", **variables) as first,
        started(arguments, folder / "1", VIT_DIST_PROCESS="1", **variables) as second,
    ):
        first.wait(), second.wait()
    return first, second


def last_lines(script, *arguments):
    """The last line on stdout of two processes that run a script with these arguments, an address and their rank."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments, f"localhost:{free_port()}"]
    processes = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        return [process.communicate(timeout=60)[0].splitlines()[-1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def until(condition, running, seconds=300):
    """Waits, with short naps, until the condition holds; fails when the command has ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert running.process.poll() is None, f"ended with {running.process.returncode}:\n{running.said()[-3000:]}"
        assert time.monotonic() < deadline, f"nothing after {seconds} s:\n{running.said()[-3000:]}"
        time.sleep(0.005)


def checkpoint_steps(workdir):
    """The steps whose checkpoints are whole; looks only, and so may be called while a run writes there."""
    folder = Path(workdir) / "checkpoints"
    return sorted(int(one.name) for one in folder.iterdir() if one.name.isdigit()) if folder.is_dir() else []


def saved_state(workdir, *overrides):
    """(step, {path: array}) of all that the newest checkpoint holds, read onto one device."""
    wanted = settings(*overrides, "mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1")
    program = Program(wanted, classes=10, steps=1, augment_on_device=True)
    checkpoints = Checkpoints(Path(workdir) / "checkpoints", keep_last=1, keep_best=0, read_only=True)
    with program.in_use():
        state = program.abstract_state()
        trees = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
        step, found = checkpoints.restore({name: tree for name, tree in trees.items() if tree is not None})
    checkpoints.close()
    paths = (
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree.leaves_with_path(found)
    )
    return step, {path: np.asarray(leaf) for path, leaf in paths}


def assert_same_run(workdir, expected, steps, *overrides):
    """Two runs of so many steps agree in every row, each there once, and in every bit of the last checkpoint."""
    assert rows(workdir) == rows(expected)
    seen = [(row["step"], row["split"]) for row in rows(workdir)]
    assert len(set(seen)) == len(seen)
    assert [step for step, split in seen if split == "train"] == list(range(1, steps + 1))
    (step, found), (_, wanted) = saved_state(workdir, *overrides), saved_state(expected, *overrides)
    assert step == steps and found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].tobytes() == array.tobytes(), name

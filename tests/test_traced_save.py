"""A run that is killed after any system call of a save, and of all else that it writes, goes on as if it had not been.

The working directory is copied after every call of a resumed run that changes it, and every copy is read, and resumed.
"""

import shutil

import pytest
from system import assert_same_run, checkpoint_steps, command, run, saved_state, settings
from tally import ROUNDS
from watched import watched

from vit_dist.run.metrics import read_rows
from vit_dist.train import train

pytestmark = pytest.mark.chaos

OVERRIDES = ("mesh.data=1", "ema_decay=0.9", "evaluate.every_steps=2", "checkpoint.every_steps=2")
RESUMED = 9 // ROUNDS or 1  # of the copies, one in so many


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A run of four steps, its folder after two, and the copies of its folder while it went from two to four."""
    folder = tmp_path_factory.mktemp("traced")
    code, running = run(command(folder / "run", *OVERRIDES, "total_steps=2"), folder / "first")
    assert code == 0, running.said()
    shutil.copytree(folder / "run", folder / "two")
    copies = watched(command(folder / "run", *OVERRIDES, "total_steps=4"), folder / "run", folder / "copies")
    return folder / "two", folder / "run", copies


def test_the_copies_are_of_every_kind_of_call(traced):
    _, _, copies = traced
    calls = [copy.call.split(" ")[0] for copy in copies]
    assert len(calls) > 60 and {"open", "write", "mkdir", "rename"} <= {call.rstrip("64at2") for call in calls}


def test_each_copy_holds_the_old_or_the_new_step_whole_and_all_rows_up_to_it(traced, tally):
    two, four, copies = traced
    states = {number: saved_state(folder, *OVERRIDES)[1] for number, folder in ((2, two), (4, four))}
    rows = read_rows(four)
    seen = set()
    for copy in copies:
        with tally.attempts("the end after any system call of a save: what is read", 1):
            step, found = saved_state(copy.folder, *OVERRIDES)
            assert found.keys() == states[step].keys(), copy
            for name, array in states[step].items():
                assert found[name].tobytes() == array.tobytes(), (copy, name)
            upto = [(row["step"], row["split"]) for row in rows if row["step"] <= step]
            kept = [(row["step"], row["split"]) for row in read_rows(copy.folder) if row["step"] <= step]
            assert kept == upto, copy
        seen.add((step, *checkpoint_steps(copy.folder)))
    assert seen >= {(2, 2), (4, 2, 4), (4, 4)}


def test_copies_that_are_resumed_end_as_the_run_that_was_not_killed(traced, tally):
    _, four, copies = traced
    wanted = settings(*OVERRIDES, "total_steps=4")
    for copy in copies[::RESUMED]:
        with tally.attempts("the end after any system call of a save: resumed", 1):
            train(wanted, copy.folder)
            assert_same_run(copy.folder, four, 4, *OVERRIDES)
            # A finished run is only read, so that nobody takes over from its dead owner.
            left = [path.name for path in copy.folder.rglob(".*") if not path.name.startswith(".owner.")]
            assert left == [], copy

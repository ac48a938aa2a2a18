"""Checkpoints: what is saved is restored, the right steps are kept, and errors are raised."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from system import last_lines

from vit_dist.config import ConfigError
from vit_dist.run.checkpoints import Checkpoints

SMALL = {"params": {"w": np.arange(4, dtype=np.float32)}}


def open_(directory, keep_last=1, keep_best=0, **options):
    return Checkpoints(directory, keep_last=keep_last, keep_best=keep_best, **options)


def state_on(mesh):
    """Parameters split over the mesh's last axis, with an AdamW state beside them."""

    def init():
        axis = mesh.axis_names[-1]
        w = jnp.arange(64, dtype=jnp.float32).reshape(8, 8)
        params = {"block": {"w": jax.reshard(w, P(axis, None)), "b": jnp.full(8, 0.5, jnp.bfloat16)}}
        return {"params": params, "optimizer": optax.adamw(1e-3).init(params), "progress": {"step": jnp.int32(7)}}

    return init


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with step 7 of a state that was laid out on eight devices."""
    directory = tmp_path_factory.mktemp("saved")
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    assert mesh.axis_types == (AxisType.Explicit, AxisType.Explicit)
    with jax.set_mesh(mesh):
        state = jax.jit(state_on(mesh))()
    checkpoints = open_(directory)
    checkpoints.save(7, state, metadata={"seed": 3})
    checkpoints.close()
    return directory, state


def test_a_state_of_eight_devices_is_restored_on_two_with_its_values_and_shardings(saved):
    directory, state = saved
    mesh = jax.make_mesh((1, 2), ("data", "fsdp"), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        step, restored = open_(directory, read_only=True).restore(jax.eval_shape(state_on(mesh)))
    assert step == 7
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new))
        assert old.dtype == new.dtype
    for tree in (restored["params"], restored["optimizer"][0].mu, restored["optimizer"][0].nu):
        assert tree["block"]["w"].sharding == NamedSharding(mesh, P("fsdp", None))
        assert [s.data.shape for s in tree["block"]["w"].addressable_shards] == [(4, 8), (4, 8)]
    assert restored["progress"]["step"].sharding == NamedSharding(mesh, P())  # eval_shape gives a scalar no sharding
    assert restored["params"]["block"]["w"].sharding.mesh.axis_types == (AxisType.Explicit, AxisType.Explicit)


def test_only_the_names_asked_for_are_read(saved):
    directory, state = saved
    step, restored = open_(directory, read_only=True).restore({"params": abstract(state["params"])}, 7)
    assert (step, list(restored)) == (7, ["params"])
    assert restored["params"]["block"]["w"].sharding == state["params"]["block"]["w"].sharding


def test_metadata_is_restored(saved):
    assert open_(saved[0], read_only=True).metadata(7) == {"seed": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda block: block.pop("b"), "a tensor params/block/b that this run does not have"),
        (lambda block: block.update(c=block["b"]), "has no tensor params/block/c"),
        (
            lambda block: block.update(w=jax.ShapeDtypeStruct((8, 4), jnp.float32)),
            r"tensor params/block/w is float32\[8, 8\], expected float32\[8, 4\]",
        ),
        (
            lambda block: block.update(b=jax.ShapeDtypeStruct((8,), jnp.float32)),
            r"tensor params/block/b is bfloat16\[8\], expected float32\[8\]",
        ),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(saved, change, message):
    directory, state = saved
    wanted = abstract(state["params"])
    change(wanted["block"])
    with pytest.raises(ConfigError, match=message):
        open_(directory, read_only=True).restore({"params": wanted})


def test_a_name_or_step_that_was_not_saved_is_an_error(saved, tmp_path):
    directory, state = saved
    with pytest.raises(ConfigError, match="holds no 'ema', only optimizer, params, progress"):
        open_(directory, read_only=True).restore({"ema": abstract(state["params"])})
    with pytest.raises(ConfigError, match="no checkpoint of step 8; there are 7"):
        open_(directory, read_only=True).restore({"params": abstract(state["params"])}, 8)
    with pytest.raises(ConfigError, match="no checkpoints here"):
        open_(tmp_path / "none", read_only=True)
    assert not (tmp_path / "none").exists()


def test_buffers_may_be_donated_right_after_save(tmp_path):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(tree):
        return jax.tree.map(lambda x: x + 1, tree)

    shardings = {"split": NamedSharding(mesh, P("fsdp")), "replicated": NamedSharding(mesh, P())}
    tree = {name: jax.device_put(np.zeros((1024, 1024), np.float32), s) for name, s in shardings.items()}
    checkpoints = open_(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        tree = advance(tree)
        before = tree
        checkpoints.save(step, {"params": tree})
        tree = advance(tree)
        assert before["split"].is_deleted()  # donated indeed
        for _ in range(10):
            tree = advance(tree)
    for index, step in enumerate((1, 2, 3)):
        restored = checkpoints.restore({"params": abstract(tree)}, step)[1]["params"]
        for array in restored.values():
            assert np.unique(np.asarray(array)).tolist() == [1 + 12 * index]
    checkpoints.close()


def test_small_tensors_are_saved_without_compiling_anything_but_their_digests(tmp_path):
    """By default Orbax compiles a program for each slice of each shape: 88 programs in a first save of tiny.py."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    shapes = [(8, 9), (16, 3), (24, 5, 2)]  # in no other test, so that nothing is compiled already
    tree = {str(shape): jax.device_put(np.ones(shape), NamedSharding(mesh, P())) for shape in shapes}
    compiled = []

    def note(event, seconds, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(more)

    checkpoints = open_(tmp_path)
    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        with jax.set_mesh(mesh):
            checkpoints.save(1, {"params": tree})
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    checkpoints.close()
    assert compiled == [{"fun_name": "jit(digests_of_shards)"}]  # the digests, all in one program


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = open_(tmp_path, keep_last=2, keep_best=2)
    kept = []
    for step, top1 in enumerate([0.1, 0.9, 0.3, 0.8, float("nan"), 0.2, 0.9], 1):
        checkpoints.save(step, SMALL, metrics={"top1": top1, "loss": -top1})
        kept.append(checkpoints.steps())
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [2, 4, 5, 6], [2, 6, 7]]
    assert (checkpoints.latest(), checkpoints.best()) == (7, 7)
    checkpoints.close()
    again = open_(tmp_path, keep_last=1, keep_best=1)  # the metrics were saved too
    assert (again.steps(), again.latest(), again.best()) == ([2, 6, 7], 7, 7)
    again.save(8, SMALL, metrics={"top1": 0.0})
    assert again.steps() == [7, 8]


def test_without_metrics_the_newest_is_kept_and_none_is_best(tmp_path):
    checkpoints = open_(tmp_path, keep_last=1, keep_best=0)
    assert (checkpoints.latest(), checkpoints.best(), checkpoints.steps()) == (None, None, [])
    for step in (10, 20):
        checkpoints.save(step, SMALL)
    assert (checkpoints.latest(), checkpoints.best(), checkpoints.steps()) == (20, None, [20])
    assert checkpoints.metadata(20) == {}


def test_a_step_saved_twice_is_saved_once(tmp_path):
    for _ in range(2):
        checkpoints = open_(tmp_path)
        checkpoints.save(5, SMALL)
        checkpoints.save(5, SMALL)
        assert checkpoints.steps() == [5]
        checkpoints.close()


def fail_to_commit(monkeypatch, directory):
    rename = os.rename

    def full(source, target, **options):
        if str(target).startswith(str(directory)):
            raise OSError("the disk is full")
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", full)


@pytest.mark.parametrize("end", ["wait", "close"])
def test_an_error_of_a_save_is_raised_at_the_end(tmp_path, monkeypatch, caplog, end):
    checkpoints = open_(tmp_path)
    checkpoints.save(1, SMALL)
    checkpoints.wait()
    fail_to_commit(monkeypatch, tmp_path)
    checkpoints.save(2, SMALL)
    with pytest.raises((OSError, ConfigError), match="the disk is full") as caught:
        getattr(checkpoints, end)()
    assert end == "close" or str(caught.value) == (
        f"{tmp_path}: step 2 could not be saved (the disk is full); the newest checkpoint is of step 1; make room, or "
        "mend the disk, and start the run again"
    )
    assert not [record for record in caplog.records if record.exc_info or record.name.startswith("vit_dist")]
    assert open_(tmp_path).steps() == [1]  # the step before it still exists


def test_a_run_goes_on_after_a_save_that_failed_and_keeps_what_there_is(tmp_path, monkeypatch, caplog):
    checkpoints = open_(tmp_path, keep_last=1)
    checkpoints.save(1, SMALL)
    checkpoints.wait()
    with monkeypatch.context() as patch:
        fail_to_commit(patch, tmp_path)
        checkpoints.save(2, SMALL)
        assert (checkpoints.latest(), checkpoints.best()) == (1, None)
        checkpoints.save(3, SMALL)
        assert checkpoints.steps() == [1]
    ours = [record.message for record in caplog.records if record.name.startswith("vit_dist")]
    assert [message.partition(": ")[2] for message in ours] == [
        f"step {step} could not be saved (the disk is full); the newest checkpoint is of step 1; the run goes on, but "
        f"ends after {left} more"
        for step, left in ((2, 2), (3, 1))
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    checkpoints.save(4, SMALL)
    assert checkpoints.steps() == [4]
    checkpoints.wait()
    checkpoints.close()


@pytest.mark.parametrize("retries", [1, 3])
def test_a_run_ends_after_so_many_saves_in_a_row_that_failed(tmp_path, monkeypatch, retries):
    checkpoints = open_(tmp_path, retries=retries)
    checkpoints.save(1, SMALL)
    checkpoints.wait()
    fail_to_commit(monkeypatch, tmp_path)
    for step in range(2, 2 + retries):
        checkpoints.save(step, SMALL)  # tells of the one before
    with pytest.raises(ConfigError, match=rf"of step 1; {retries} failures in a row \(checkpoint.retries\); make room"):
        checkpoints.save(9, SMALL)


def test_failures_count_in_a_row(tmp_path, monkeypatch):
    checkpoints = open_(tmp_path, retries=2)
    for step in range(1, 7):
        with monkeypatch.context() as patch:
            if step % 2:
                fail_to_commit(patch, tmp_path)
            checkpoints.save(step, SMALL)
            assert checkpoints.latest() == (step - step % 2 or None)
    checkpoints.close()


def test_nothing_is_written_to_a_disk_without_room_for_it(tmp_path, monkeypatch, caplog):
    checkpoints = open_(tmp_path, retries=2)
    checkpoints.save(1, SMALL)
    checkpoints.wait()
    files = sorted(tmp_path.rglob("*"))
    size = sum(file.stat().st_size for file in files if file.is_file())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size - 1))
    checkpoints.save(2, SMALL)
    assert re.search(
        r"step 2 could not be saved \(the disk has 0.0 MB free, it takes 0.0 MB\); the newest", caplog.text
    )
    assert sorted(tmp_path.rglob("*")) == files
    with pytest.raises(ConfigError, match="2 failures in a row"):
        checkpoints.save(3, SMALL)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
    checkpoints.save(4, SMALL)
    assert checkpoints.steps() == [4]
    checkpoints.close()


def test_a_kill_in_the_middle_of_a_save_leaves_the_earlier_steps_complete(tmp_path):
    script = """
        import os, pathlib, sys, time
        import numpy as np
        from vit_dist.run.checkpoints import Checkpoints
        checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), keep_last=1, keep_best=0)
        checkpoints.save(1, {"params": {"w": np.arange(4, dtype=np.float32)}})
        checkpoints.wait()
        def stuck(source, target):
            print("committing", flush=True)
            time.sleep(60)
        os.rename = stuck
        checkpoints.save(2, {"params": {"w": np.zeros(4, np.float32)}})
        checkpoints.wait()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "committing\n"
        process.send_signal(signal.SIGKILL)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert "1" in left and "2" not in left and any("tmp" in name for name in left)
    wanted = {"params": {"w": jax.ShapeDtypeStruct((4,), jnp.float32)}}
    step, restored = open_(tmp_path, read_only=True).restore(wanted)
    assert (step, restored["params"]["w"].tolist()) == (1, [0, 1, 2, 3])
    assert sorted(path.name for path in tmp_path.iterdir()) == left  # a reader changes nothing
    checkpoints = open_(tmp_path)
    checkpoints.save(2, SMALL)
    assert checkpoints.steps() == [2]
    checkpoints.close()
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_an_old_step_half_deleted_by_a_kill_hides_no_other(tmp_path):
    checkpoints = open_(tmp_path, keep_last=3, keep_best=1)
    for step in (1, 2, 3):
        checkpoints.save(step, SMALL, metrics={"top1": step / 10})
    checkpoints.close()
    shutil.rmtree(tmp_path / "1" / "metrics")
    shutil.rmtree(tmp_path / "2" / "params")
    (tmp_path / "1" / "_CHECKPOINT_METADATA").unlink()
    again = open_(tmp_path, keep_last=1, keep_best=1)
    assert (again.latest(), again.best()) == (3, 3)
    again.save(4, SMALL, metrics={"top1": 0.1})
    assert again.steps() == [3, 4]


def test_two_processes_save_and_restore_one_state(tmp_path):
    script = """
        import pathlib, sys
        import jax, jax.numpy as jnp
        from jax.sharding import PartitionSpec as P
        directory, address, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
        jax.config.update("jax_num_cpu_devices", 2)
        jax.distributed.initialize(address, 2, rank)
        from vit_dist.run.checkpoints import Checkpoints
        mesh = jax.make_mesh((4,), ("fsdp",))
        def init():
            return {"w": jax.reshard(jnp.arange(8.0), P("fsdp"))}
        with jax.set_mesh(mesh):
            state = {"params": jax.jit(init)()}
            checkpoints = Checkpoints(pathlib.Path(directory), keep_last=1, keep_best=1)
            for step, top1 in ((1, 0.5), (2, 0.25), (3, 0.125)):
                checkpoints.save(step, state, metrics={"top1": top1}, metadata={"step": step})
            step, restored = checkpoints.restore(jax.eval_shape(lambda: {"params": init()}))
            shards = [shard.data.tolist() for shard in restored["params"]["w"].addressable_shards]
            print(checkpoints.steps(), checkpoints.best(), step, shards)
            checkpoints.close()
        jax.distributed.shutdown()
    """
    shown = last_lines(script, str(tmp_path))
    assert shown == ["[1, 3] 1 3 [[0.0, 1.0], [2.0, 3.0]]", "[1, 3] 1 3 [[4.0, 5.0], [6.0, 7.0]]"]
    assert open_(tmp_path, read_only=True).metadata(3) == {"step": 3}

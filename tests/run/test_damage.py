"""Damaged checkpoints: each is told, and the step before it is used."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from damage import KINDS, faults, inflicted
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vit_dist.config import ConfigError
from vit_dist.run import checkpoints
from vit_dist.run.checkpoints import Checkpoints
from vit_dist.run.falling_back import restore_newest_whole


def state_of(step):
    """A state of a step, over eight devices: split and replicated tensors, of four types."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    numbers = np.random.default_rng(step)
    kernel = jax.device_put(numbers.normal(size=(16, 24)).astype(np.float32), NamedSharding(mesh, P("fsdp")))
    bias = jax.device_put(numbers.normal(size=64).astype(jnp.bfloat16), NamedSharding(mesh, P()))
    mask = jax.device_put(np.arange(8) < step, NamedSharding(mesh, P(("data", "fsdp"))))
    count = jax.device_put(np.int32(step), NamedSharding(mesh, P()))
    return {"parameters": {"head": {"kernel": kernel, "bias": bias}}, "optimizer": {"mask": mask}, "step": count}


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(0))


def assert_is(trees, step):
    expected = state_of(step)
    assert jax.tree.structure(trees) == jax.tree.structure(expected)
    for found, wanted in zip(jax.tree.leaves(trees), jax.tree.leaves(expected), strict=True):
        assert np.asarray(found).tobytes() == np.asarray(wanted).tobytes()


def save(directory, *steps, keep_last=4, **options):
    opened = Checkpoints(directory, keep_last=keep_last, **options)
    for step in steps:
        opened.save(step, state_of(step), metrics={"top1": step / 10}, metadata={"seconds": step})
    opened.close()
    return directory


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    return save(tmp_path_factory.mktemp("two") / "checkpoints", 1, 2)


@pytest.fixture
def copied(two_steps, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_DELETION_SECONDS", 0)  # nobody deletes a step here
    return shutil.copytree(two_steps, tmp_path / "checkpoints")


def reader(directory, **options):
    return Checkpoints(directory, read_only=True, **options)


def check(directory, fault):
    """The newest of two steps has this fault: who reads it refuses it and names step 1, which a resumed run takes."""
    parameters = {"parameters": abstract()["parameters"]}
    readings = {
        "eval": lambda: reader(directory).restore(parameters),
        "predict": lambda: reader(directory).reading(
            lambda step: reader(directory).tensors(step, "parameters"), "newest"
        ),
    }
    for verb, read in readings.items():
        with pytest.raises(ConfigError, match="damaged: .*the newest step that is whole is 1: name it") as caught:
            read()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600, (verb, fault)
    found = restore_newest_whole(Checkpoints(directory), abstract())
    assert (found.step, found.metadata) == (1, {"seconds": 1}), fault
    assert_is(found.trees, 1)
    assert sorted(path.name for path in directory.iterdir()) == ["1", "corrupt-2"]


def test_every_fault_of_a_sample_of_files_is_told_and_the_step_before_is_used(copied):
    every = faults(copied / "2")
    sample = [fault for number, fault in enumerate(every) if number % 9 == 4]
    assert {fault.kind for fault in sample} == set(KINDS)
    for fault in inflicted(copied, 2, sample):
        check(copied, fault)


@pytest.mark.slow
def test_every_fault_of_every_file_is_told_and_the_step_before_is_used(copied):
    every = faults(copied / "2")
    for fault in inflicted(copied, 2, every):
        check(copied, fault)
    assert len(every) >= 100

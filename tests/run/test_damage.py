"""Damaged checkpoints: each is told, and the step before it is used."""

import errno
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from damage import KINDS, faults, inflicted
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vit_dist.config import ConfigError
from vit_dist.run import checkpoints, step_record, whole
from vit_dist.run.checkpoints import Checkpoints
from vit_dist.run.falling_back import restore_newest_whole
from vit_dist.run.step_record import Damaged


def state_of(step):
    """A state of a step, over eight devices: split and replicated tensors, of four types."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    numbers = np.random.default_rng(step)
    kernel = jax.device_put(numbers.normal(size=(16, 96)).astype(np.float32), NamedSharding(mesh, P("fsdp")))
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


@pytest.mark.chaos
def test_every_fault_of_every_file_is_told_and_the_step_before_is_used(copied, tally):
    every = faults(copied / "2")
    for fault in inflicted(copied, 2, every):
        with tally.attempts(f"a file of a checkpoint {fault.kind}", 1):
            check(copied, fault)
    assert len(every) >= 100


@pytest.mark.parametrize("small", [True, False])
def test_a_bit_of_a_tensor_is_noticed_and_the_tensor_named(tmp_path, monkeypatch, small):
    """Of a large file only the size is recorded, so that the digest of the tensor alone can notice."""
    if not small:
        monkeypatch.setattr(step_record, "_SMALL", 1500)
    save(tmp_path, 1, 2)
    (data,) = (tmp_path / "2/parameters/ocdbt.process_0/d").iterdir()
    content = data.read_bytes()
    reasons = []
    for place in range(0, len(content), len(content) // 12):
        data.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        opened = reader(tmp_path)
        try:
            assert_is(opened.load(abstract(), 2), 2)  # the end of the file holds no number that is read
        except Damaged as error:
            reasons.append(error.reason)
            with pytest.raises(Damaged) as again:
                opened.tensors(2, "parameters")
            assert again.value.reason == error.reason
    assert len(reasons) == 13 or not small
    assert sum(bool(re.match(r"tensor parameters/head/kernel\b", reason)) for reason in reasons) >= 10, reasons


def test_a_checkpoint_without_digests_is_read_and_a_sentence_said(copied, caplog):
    without_digests(copied / "2")
    _, trees = reader(copied).restore(abstract())
    assert_is(trees, 2)
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        "has no digests, so not all damage to it would be noticed"
    ]


def without_digests(folder):
    """Makes a step as earlier versions saved it."""
    (folder / step_record.FILE).unlink()
    file = folder / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    assert metadata["custom_metadata"].pop("digests") is True
    file.write_text(json.dumps(metadata))


def test_damage_to_a_checkpoint_without_digests_that_can_be_told_is_told_in_a_line(copied):
    without_digests(copied / "2")
    told = 0
    for fault in inflicted(copied, 2, [one for one in faults(copied / "2") if one.kind != "flipped"]):
        try:
            assert_is(reader(copied).restore(abstract())[1], 2)
        except ConfigError as error:
            assert len(str(error)) < 800 and re.fullmatch(
                r"\S+/2: damaged: .{,300}; the newest step that is whole is 1: name it by step", str(error)
            )
            told += 1
        else:
            assert not fault.file.startswith("parameters/ocdbt.process_0/d/")
    assert told >= 20


def test_without_verify_a_damaged_checkpoint_is_read_as_it_is(copied):
    (copied / "2" / step_record.FILE).write_text("{")
    with pytest.raises(ConfigError, match="does not hold what was written"):
        reader(copied).restore(abstract())
    assert_is(reader(copied, verify=False).restore(abstract())[1], 2)


def test_if_no_checkpoint_is_whole_a_run_does_not_begin_again_and_nothing_is_renamed(copied):
    (copied / "1" / "_CHECKPOINT_METADATA").unlink()
    (copied / "2/metrics/metrics").write_text("{}")
    for read in (lambda: restore_newest_whole(Checkpoints(copied), abstract()), reader_of(copied)):
        with pytest.raises(ConfigError, match="is whole"):
            read()
    assert sorted(path.name for path in copied.iterdir()) == ["1", "2"]


def reader_of(directory):
    return lambda: reader(directory).restore(abstract())


def test_two_damaged_steps_are_set_aside_beside_those_of_an_earlier_time(tmp_path):
    save(tmp_path, 1, 2, 3)
    (tmp_path / "corrupt-3").mkdir()
    for step in (2, 3):
        (tmp_path / str(step) / "step" / "manifest.ocdbt").unlink()
    found = restore_newest_whole(Checkpoints(tmp_path), abstract())
    assert found.step == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "corrupt-2", "corrupt-3", "corrupt-3-2"]
    again = Checkpoints(tmp_path, keep_last=2)
    again.save(2, state_of(2))
    assert again.steps() == [1, 2]  # Orbax does not trip over them
    again.close()


def test_an_older_step_whose_metrics_cannot_be_read_is_set_aside_too(copied):
    (copied / "1/metrics/metrics").write_text("{")
    opened = Checkpoints(copied, keep_best=1)
    assert restore_newest_whole(opened, abstract()).step == 2
    opened.save(3, state_of(3), metrics={"top1": 0.1})
    assert (opened.best(), opened.steps()) == (2, [2, 3])
    opened.close()


def test_the_best_is_chosen_among_those_that_can_be_read(copied, caplog):
    (copied / "2/metrics/metrics").write_text("{")
    assert reader(copied).best() == 1
    assert "metrics/metrics cannot be read; it is not looked at for the best" in caplog.text


def test_a_reader_whose_step_is_deleted_meanwhile_reads_the_newest_that_there_is_then(copied, monkeypatch):
    load = whole.load

    def deleted_first(folder, name, tree):
        if folder.name == "2":
            save(copied, 3, keep_last=1)
            assert [path.name for path in copied.iterdir()] == ["3"]
        return load(folder, name, tree)

    monkeypatch.setattr(whole, "load", deleted_first)
    step, trees = reader(copied).restore(abstract())
    assert step == 3
    assert_is(trees, 3)


def test_a_reader_of_one_step_that_is_deleted_meanwhile_is_told_which_there_are(copied, monkeypatch):
    load = whole.load

    def deleted_first(folder, name, tree):
        shutil.rmtree(folder)
        return load(folder, name, tree)

    monkeypatch.setattr(whole, "load", deleted_first)
    with pytest.raises(ConfigError, match="no checkpoint of step 2; there are 1"):
        reader(copied).restore(abstract(), 2)


def test_an_error_of_the_disk_is_not_taken_for_damage(copied, monkeypatch):
    def denied(*_, **__):
        raise ValueError("PERMISSION_DENIED: Error opening local file")

    monkeypatch.setattr(tensorstore, "open", denied)
    with pytest.raises(ConfigError, match="the disk cannot be read .PERMISSION_DENIED"):
        restore_newest_whole(Checkpoints(copied), abstract())
    assert sorted(path.name for path in copied.iterdir()) == ["1", "2"]


def test_a_sector_that_cannot_be_read_is_damage_and_a_permission_is_not(copied, monkeypatch):
    def failing(number):
        def facts(file):
            if file.parent.parent.name == "2":
                raise OSError(number, os.strerror(number), str(file))
            return step_record_facts(file)

        return facts

    step_record_facts = step_record._facts
    monkeypatch.setattr(step_record, "_facts", failing(errno.EACCES))
    with pytest.raises(PermissionError):
        restore_newest_whole(Checkpoints(copied), abstract())
    monkeypatch.setattr(step_record, "_facts", failing(errno.EIO))
    with pytest.raises(Damaged, match=r"2: damaged: \S+ cannot be read \(Input/output error\)"):
        reader(copied).load(abstract(), 2)
    assert restore_newest_whole(Checkpoints(copied), abstract()).step == 1

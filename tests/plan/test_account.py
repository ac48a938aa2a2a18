"""The account of a compiled step on a chip whose rates are known, by hand; and of what is too large."""

import dataclasses
import types

import jax
import pytest
from system import NOTHING_RANDOM, settings, train_here

from vit_dist.model import flops
from vit_dist.plan import account as accounts
from vit_dist.plan import compile as compiling
from vit_dist.plan import links, targets
from vit_dist.plan.account import account, account_of_too_large, memory, of_run
from vit_dist.plan.attached import plan_attached
from vit_dist.plan.collectives import collectives
from vit_dist.plan.compile import Step, TooLarge, compile_step, held_bytes, make_program
from vit_dist.plan.report import lines
from vit_dist.plan.roofline import EFFICIENCY
from vit_dist.plan.targets import Chip
from vit_dist.plan.traffic import traffic

# An H200's peaks: 989 TFLOP/s in bfloat16, 494 in float32.
CHIP = Chip("one", "NVIDIA H200", "cpu", 2**30, 1e12, "NVLink", 1e11, 0, 1e10, "none")
TINY = ("model.num_classes=10", *NOTHING_RANDOM)
ASKED = (*TINY, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "model.remat=block")


@pytest.fixture(scope="module")
def step():
    return compile_step(make_program(settings(*ASKED), jax.devices()))


@pytest.fixture
def wired(monkeypatch):
    """CPU devices that talk over a wire of 100 GB/s."""
    monkeypatch.setattr(links, "link", lambda chip, devices: ("NVLink", chip.link_bandwidth))


def test_time_follows_from_flops_bytes_and_what_is_said(step, wired):
    found = account(step, CHIP)
    text, model = step.executable.as_text(), step.program.settings.model
    whole, moved = flops.hardware_flops(model), traffic(text)
    # 16 images of 64. The blocks' products are shared by the two of a tensor group; both do what lies around them.
    around = flops.training_flops(dataclasses.replace(model, depth=0))
    counted = 16 * ((whole - around) / 2 + around)
    assert found["bounds_ms"]["arithmetic"] == pytest.approx(counted / 494e12 * 1000)
    assert found["bounds_ms"]["memory"] == pytest.approx((moved.product_bytes + moved.other_bytes) / 1e12 * 1000)
    axes = {"data": 2, "fsdp": 2, "tensor": 2}
    sent = 0.0
    for one in collectives(text, axes):
        members = 1
        for axis in one.axes:
            members *= axes[axis]
        ring = {"all-reduce": 2 * (members - 1) / members, "collective-permute": 1}
        sent += one.count * one.bytes * ring.get(one.kind, (members - 1) / members)
    assert found["network_ms"] == pytest.approx({"NVLink": sent / 1e11 * 1000})
    assert sum(row["ms"] for row in found["collectives"]) == pytest.approx(found["network_ms"]["NVLink"])
    assert found["binds"] == max(found["bounds_ms"], key=found["bounds_ms"].get)
    assert found["step_ms"] > max(found["bounds_ms"].values())
    assert found["images_per_second"] == pytest.approx(64 / found["step_ms"] * 1000)
    assert found["mfu"] == pytest.approx(found["flops"]["model"] / (found["step_ms"] / 1000 * 494e12 * 8))
    assert found["flops"]["hardware"] == whole * 64 > found["flops"]["model"]
    assert found["efficiencies"] == EFFICIENCY


def test_alike_collectives_are_one_row_with_their_sum(step, wired):
    rows = account(step, CHIP)["collectives"]
    kinds = [(row["kind"], tuple(row["axes"]), row["bytes"]) for row in rows]
    assert len(set(kinds)) == len(kinds)
    sizes = [row["bytes"] * row["count"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    found = collectives(step.executable.as_text(), {"data": 2, "fsdp": 2, "tensor": 2})
    assert sum(sizes) == sum(one.bytes * one.count for one in found)


def test_a_tpu_never_holds_more_than_its_compiler_lets_through(step):
    whole = sum(memory(step, CHIP).values())
    small = {"memory_bytes": whole - 1000}
    tpu = memory(step, types.SimpleNamespace(platform="tpu", **small))
    assert sum(tpu.values()) == whole - 1000
    assert sum(memory(step, types.SimpleNamespace(platform="gpu", **small)).values()) == whole


def test_of_a_run_hours_and_hosts():
    found = of_run(settings("total_steps=3600"), {"step_ms": 500.0, "images_per_second": 80.0}, 16, 4, None)
    assert found == {"images_per_second_per_host": 20.0, "steps": 3600, "hours": 0.5, "device_hours": 8.0}
    epochs = settings("total_steps=null", "total_epochs=3")
    step = {"step_ms": 1000.0, "images_per_second": 64.0}
    assert of_run(epochs, step, 8, 1, None)["hours"] is None
    assert of_run(epochs, step, 8, 1, 1000)["steps"] == 47  # 3000 images at 64 a step
    unknown = of_run(epochs, {"step_ms": None, "images_per_second": None}, 8, 1, 1000)
    assert (unknown["steps"], unknown["hours"], unknown["device_hours"]) == (47, None, None)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (59.64G) "
            "exceeds available HBM (15.75G).",
            int(59.64 * 2**30) + 500,
        ),
        (
            "RESOURCE_EXHAUSTED: Compilation failure: Ran out of memory in memory space hbm. Used 17.08G of 15.75G "
            "hbm. Exceeded hbm capacity by 1.33G.",
            int(17.08 * 2**30),
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.08M of 16.00M vmem.", None),
        ("INTERNAL: Used 17.08G of 15.75G hbm", None),
    ],
)
def test_what_a_compiler_says_it_needs_is_read(message, needed):
    assert compiling._needed(message, 500) == needed


def test_what_the_compiler_refused_does_not_fit_however_it_rounds(step):
    found = account_of_too_large(step.program, TooLarge(CHIP.memory_bytes, step.held), CHIP)
    assert (found["fits"], found["headroom_bytes"]) == (False, -1)


def test_what_is_too_large_has_the_keys_of_what_fits_and_what_is_known(step, wired):
    error = TooLarge(5 * 2**30, step.held)
    found, fits = account_of_too_large(step.program, error, CHIP), account(step, CHIP)
    assert set(found) == set(fits)
    assert (found["fits"], found["peak_bytes"], found["headroom_bytes"]) == (False, 5 * 2**30, -4 * 2**30)
    assert sum(found["memory"].values()) == 5 * 2**30
    assert found["memory"]["parameters"] == fits["memory"]["parameters"]
    assert found["bounds_ms"] == {**fits["bounds_ms"], "memory": None, "network": None}
    assert found["step_ms"] is None and found["collectives"] == []


def test_a_compiler_that_fails_is_said_in_one_line(monkeypatch):
    program = make_program(settings(*ASKED), jax.devices())

    class Fails:
        def lower(self, *arguments):
            return self

        def compile(self, options):
            raise jax.errors.JaxRuntimeError("INTERNAL: odd tiles\nmore of it")

    monkeypatch.setattr(program, "train_step", Fails())
    with pytest.raises(compiling.ConfigError, match="cannot make this program: INTERNAL: odd tiles; change"):
        compile_step(program)


def test_a_mesh_that_leaves_devices_idle_is_refused():
    with pytest.raises(compiling.ConfigError, match="mesh: takes 2 of the target's 8 devices"):
        make_program(settings(*TINY, "mesh.data=2"), jax.devices())


@pytest.fixture(
    scope="module",
    params=[
        ("mesh.data=4", "mesh.fsdp=2"),
        ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "accumulate_steps=2", "mixup=0.2"),
        ("mesh.dcn_data=2", "mesh.data=1", "mesh.fsdp=2", "mesh.context=2"),
    ],
    ids=str,
)
def compiled(request):
    """(program, state, batch, executable), as `train` has them."""
    program = make_program(settings(*TINY, *request.param), jax.devices())
    with program.in_use():
        state, batch = program.abstract_state(), program.abstract_batch()
        return program, state, batch, program.train_step.lower(state, batch).compile()


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_run_says_what_it_needs_and_on_known_chips_how_long_it_takes(platform, compiled, monkeypatch, wired):
    program, state, batch, executable = compiled
    with program.in_use():
        unknown = plan_attached(program, executable, state, batch)
        chip = dataclasses.replace(CHIP, platform=platform)
        monkeypatch.setattr(targets, "attached_chip", lambda device: chip)
        known = plan_attached(program, executable, state, batch)
        nameless = dataclasses.replace(chip, memory_bytes=None)
        monkeypatch.setattr(targets, "attached_chip", lambda device: nameless)
        unlimited = plan_attached(program, executable, state, batch)
    whole = sum(memory(Step(program, executable, held_bytes(state, batch)), CHIP).values())
    assert unknown["peak_bytes"] == known["peak_bytes"] == unlimited["peak_bytes"] == whole
    assert unknown["step_ms"] is None and len(lines(unknown)) == 2
    planned = account(Step(program, executable, held_bytes(state, batch)), chip)  # as `plan` has it
    assert known == {**planned, **{name: known[name] for name in known.keys() - planned.keys()}}
    assert known["hours"] == pytest.approx(program.steps * known["step_ms"] / 3.6e6)
    assert len(lines(known)) == 3 and "images/s" in lines(known)[2]


def test_a_program_that_cannot_be_read_still_says_what_memory_a_run_needs(compiled, monkeypatch, caplog):
    def unreadable(text, axes):
        raise ValueError("no groups that can be read in: all-reduce")

    monkeypatch.setattr(targets, "attached_chip", lambda device: CHIP)
    monkeypatch.setattr(accounts, "collectives", unreadable)
    program, state, batch, executable = compiled
    with program.in_use():
        found = plan_attached(program, executable, state, batch)
    assert "the time of a step cannot be planned: no groups that can be read" in caplog.text
    assert found["step_ms"] is None and len(lines(found)) == 2
    assert found["peak_bytes"] == sum(memory(Step(program, executable, held_bytes(state, batch)), CHIP).values())


def test_training_begins_with_three_lines(tmp_path, monkeypatch, wired, capfd):
    monkeypatch.setattr(targets, "attached_chip", lambda device: CHIP)
    train_here(tmp_path, "total_steps=2", "mesh.data=8", *NOTHING_RANDOM)
    said = [line for line in capfd.readouterr().err.splitlines() if "plan: " in line]
    assert len(said) == 3 and "a device needs" in said[0] and "images/s" in said[2]

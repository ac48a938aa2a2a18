"""The analysis of a compiled step on a chip whose rates are known, by hand; and of a step that is too large."""

import dataclasses
import types

import jax
import pytest
from system import NOTHING_RANDOM, settings, train_here

from vit_dist.model import flops
from vit_dist.plan import analysis, links, targets
from vit_dist.plan import compile as compiling
from vit_dist.plan.analysis import memory_by_use, run_fields, step_analysis, too_large_analysis
from vit_dist.plan.attached import plan_attached
from vit_dist.plan.collectives import collectives
from vit_dist.plan.compile import CompiledStep, TooLarge, compile_step, held_bytes, make_program
from vit_dist.plan.report import lines
from vit_dist.plan.roofline import EFFICIENCY
from vit_dist.plan.targets import Chip
from vit_dist.plan.traffic import traffic

# An H200's peaks: 989 TFLOP/s in bfloat16, 494 in float32.
CHIP = Chip("one", "NVIDIA H200", "cpu", 2**30, 1e12, "NVLink", 1e11, 0, 1e10, "none")
TINY = ("model.num_classes=10", *NOTHING_RANDOM)
OVERRIDES = (*TINY, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "model.remat=block")


@pytest.fixture(scope="module")
def step():
    return compile_step(make_program(settings(*OVERRIDES), jax.devices()))


@pytest.fixture
def linked(monkeypatch):
    """CPU devices that are connected by links of 100 GB/s."""
    monkeypatch.setattr(links, "slowest_link", lambda chip, devices: links.Link("NVLink", chip.link_bandwidth))


def test_time_follows_from_flops_memory_traffic_and_collectives(step, linked):
    found = step_analysis(step, CHIP)
    text, model = step.executable.as_text(), step.program.settings.model
    total, moved = flops.hardware_flops(model), traffic(text)
    # 16 images of 64. The blocks' products are shared by the two of a tensor group; both do what lies around them.
    around = flops.training_flops(dataclasses.replace(model, depth=0))
    counted = 16 * ((total - around) / 2 + around)
    assert found["bounds_ms"]["arithmetic"] == pytest.approx(counted / 494e12 * 1000)
    assert found["bounds_ms"]["memory"] == pytest.approx((moved.product_bytes + moved.other_bytes) / 1e12 * 1000)
    axes = {"data": 2, "fsdp": 2, "tensor": 2}
    sent = 0.0
    for collective in collectives(text, axes):
        members = 1
        for axis in collective.axes:
            members *= axes[axis]
        ring = {"all-reduce": 2 * (members - 1) / members, "collective-permute": 1}
        sent += collective.count * collective.bytes * ring.get(collective.kind, (members - 1) / members)
    assert found["network_ms"] == pytest.approx({"NVLink": sent / 1e11 * 1000})
    assert sum(row["ms"] for row in found["collectives"]) == pytest.approx(found["network_ms"]["NVLink"])
    assert found["binds"] == max(found["bounds_ms"], key=found["bounds_ms"].get)
    assert found["traffic"] == dataclasses.asdict(moved)
    assert found["step_ms"] > max(found["bounds_ms"].values())
    assert found["images_per_second"] == pytest.approx(64 / found["step_ms"] * 1000)
    assert found["mfu"] == pytest.approx(found["flops"]["model"] / (found["step_ms"] / 1000 * 494e12 * 8))
    assert found["flops"]["hardware"] == total * 64 > found["flops"]["model"]
    assert found["efficiencies"] == EFFICIENCY


def test_equal_collectives_share_a_row_with_their_sum(step, linked):
    rows = step_analysis(step, CHIP)["collectives"]
    kinds = [(row["kind"], tuple(row["axes"]), row["bytes"]) for row in rows]
    assert len(set(kinds)) == len(kinds)
    sizes = [row["bytes"] * row["count"] for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    found = collectives(step.executable.as_text(), {"data": 2, "fsdp": 2, "tensor": 2})
    assert sum(sizes) == sum(collective.bytes * collective.count for collective in found)
    # XLA:CPU communicates in synchronous instructions.
    assert all(row["exposed"] == row["count"] for row in rows)


def test_a_tpu_never_holds_more_than_its_compiler_lets_through(step):
    peak = sum(memory_by_use(step, CHIP).values())
    small = {"memory_bytes": peak - 1000}
    tpu = memory_by_use(step, types.SimpleNamespace(platform="tpu", **small))
    assert sum(tpu.values()) == peak - 1000
    assert sum(memory_by_use(step, types.SimpleNamespace(platform="gpu", **small)).values()) == peak


def test_hours_of_a_run_and_images_of_a_host():
    found = run_fields(settings("total_steps=3600"), {"step_ms": 500.0, "images_per_second": 80.0}, 16, 4, None)
    assert found == {"images_per_second_per_host": 20.0, "steps": 3600, "hours": 0.5, "device_hours": 8.0}
    epochs = settings("total_steps=null", "total_epochs=3")
    step = {"step_ms": 1000.0, "images_per_second": 64.0}
    assert run_fields(epochs, step, 8, 1, None)["hours"] is None
    assert run_fields(epochs, step, 8, 1, 1000)["steps"] == 47  # 3000 images at 64 a step
    unknown = run_fields(epochs, {"step_ms": None, "images_per_second": None}, 8, 1, 1000)
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
def test_the_memory_that_the_compiler_reports_is_read(message, needed):
    assert compiling._needed_bytes(message, 500) == needed


def test_a_step_that_the_compiler_refused_does_not_fit_even_if_its_figure_is_rounded(step):
    found = too_large_analysis(step.program, TooLarge(CHIP.memory_bytes, step.held), CHIP)
    assert (found["fits"], found["headroom_bytes"]) == (False, -1)


def test_a_step_that_is_too_large_has_the_same_keys_and_the_known_values(step, linked):
    error = TooLarge(5 * 2**30, step.held)
    found, fits = too_large_analysis(step.program, error, CHIP), step_analysis(step, CHIP)
    assert set(found) == set(fits)
    assert (found["fits"], found["peak_bytes"], found["headroom_bytes"]) == (False, 5 * 2**30, -4 * 2**30)
    assert sum(found["memory"].values()) == 5 * 2**30
    assert found["memory"]["parameters"] == fits["memory"]["parameters"]
    assert found["bounds_ms"] == {**fits["bounds_ms"], "memory": None, "network": None}
    assert found["step_ms"] is None and found["collectives"] == []


def test_an_error_of_the_compiler_is_reported_in_one_line(monkeypatch):
    program = make_program(settings(*OVERRIDES), jax.devices())

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
def test_a_run_logs_its_memory_and_on_known_chips_its_time(platform, compiled, monkeypatch, linked):
    program, state, batch, executable = compiled
    with program.in_use():
        unknown = plan_attached(program, executable, state, batch)
        chip = dataclasses.replace(CHIP, platform=platform)
        monkeypatch.setattr(targets, "attached_chip", lambda device: chip)
        known = plan_attached(program, executable, state, batch)
        nameless = dataclasses.replace(chip, memory_bytes=None)
        monkeypatch.setattr(targets, "attached_chip", lambda device: nameless)
        unlimited = plan_attached(program, executable, state, batch)
    peak = sum(memory_by_use(CompiledStep(program, executable, held_bytes(state, batch)), CHIP).values())
    assert unknown["peak_bytes"] == known["peak_bytes"] == unlimited["peak_bytes"] == peak
    assert unknown["step_ms"] is None and len(lines(unknown)) == 2
    planned = step_analysis(CompiledStep(program, executable, held_bytes(state, batch)), chip)  # as `plan` has it
    assert known == {**planned, **{name: known[name] for name in known.keys() - planned.keys()}}
    assert known["hours"] == pytest.approx(program.steps * known["step_ms"] / 3.6e6)
    assert len(lines(known)) == 3 and "images/s" in lines(known)[2]


def test_the_memory_of_a_program_that_cannot_be_read_is_still_logged(compiled, monkeypatch, caplog):
    def unreadable(text, axes):
        raise ValueError("no groups that can be read in: all-reduce")

    monkeypatch.setattr(targets, "attached_chip", lambda device: CHIP)
    monkeypatch.setattr(analysis, "collectives", unreadable)
    program, state, batch, executable = compiled
    with program.in_use():
        found = plan_attached(program, executable, state, batch)
    assert "the time of a step cannot be planned: no groups that can be read" in caplog.text
    assert found["step_ms"] is None and len(lines(found)) == 2
    assert found["peak_bytes"] == sum(
        memory_by_use(CompiledStep(program, executable, held_bytes(state, batch)), CHIP).values()
    )


def test_training_begins_with_three_lines(tmp_path, monkeypatch, linked, capfd):
    monkeypatch.setattr(targets, "attached_chip", lambda device: CHIP)
    train_here(tmp_path, "total_steps=2", "mesh.data=8", *NOTHING_RANDOM)
    logged = [line for line in capfd.readouterr().err.splitlines() if "plan: " in line]
    assert len(logged) == 3 and "a device needs" in logged[0] and "images/s" in logged[2]

"""`plan` for the fake mesh: its figures against those of the compiled program and of the run."""

import dataclasses
import json

import jax
import pytest
from compiled import compiled_step, program_on
from system import NOTHING_RANDOM, RECIPE, settings

import vit_dist
from vit_dist import cli
from vit_dist.config import ConfigError
from vit_dist.plan import report, targets, verb
from vit_dist.plan.verb import changed_keys, overridden, plan
from vit_dist.program import Program

CPU = ("model.num_classes=10", *NOTHING_RANDOM)
LAYOUTS = {
    "data=8": ("mesh.data=8",),
    "fsdp=8": ("mesh.data=1", "mesh.fsdp=8"),
    "2x2x2": ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2", "ema_decay=0.9", "model.remat=block"),
    "micro-batches": ("mesh.data=4", "mesh.fsdp=2", "accumulate_steps=4"),
}
KEYS = (  # that scripts rely on, by DESIGN.md
    "fits peak_bytes device_bytes memory bounds_ms step_ms images_per_second mfu collectives".split()
)


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request):
    """(overrides, plan) for `cpu:8`"""
    asked = (*CPU, *LAYOUTS[request.param])
    return asked, plan(settings(*asked), "cpu:8")


def test_memory_is_what_the_program_that_trains_needs(layout):
    overrides, planned = layout
    axes = [one.removeprefix("mesh.").split("=") for one in overrides if one.startswith("mesh.")]
    trains = compiled_step(program_on({axis: int(size) for axis, size in axes}, *overrides))
    of = trains.memory_analysis()
    needed = (
        of.argument_size_in_bytes
        + of.temp_size_in_bytes
        + of.output_size_in_bytes
        - of.alias_size_in_bytes
        + of.generated_code_size_in_bytes
    )
    assert planned["peak_bytes"] == pytest.approx(needed, rel=0.05)


def test_the_planned_state_is_what_devices_really_hold(layout):
    overrides, planned = layout
    asked = settings(*overrides)
    program = Program(asked, classes=10, steps=20, augment_on_device=True)
    with program.in_use():
        state = program.new_state()
    device = program.mesh.devices.flat[0]

    def held(tree):
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    memory = planned["memory"]
    assert memory["parameters"] == held(state.parameters)
    assert memory["optimizer"] == held((state.optimizer, state.step))
    assert memory["ema"] == held(state.ema)
    rows = asked.batch_size // (8 // program.mesh.shape.get("tensor", 1))
    assert memory["batch"] == rows * (8 * 8 + 4 + 4)  # an image of 8x8x1 bytes, a label, a number


def test_the_uses_of_memory_add_up_to_the_peak(layout):
    planned = layout[1]
    assert sum(planned["memory"].values()) == planned["peak_bytes"]
    assert min(planned["memory"].values()) >= 0
    assert planned["headroom_bytes"] == planned["device_bytes"] - planned["peak_bytes"]
    assert planned["fits"] is True


def test_the_json_has_the_keys_that_scripts_rely_on(layout):
    planned = layout[1]
    assert set(KEYS) <= set(planned)
    assert json.loads(json.dumps(planned)) == planned
    assert planned["step_ms"] is None  # of a CPU nothing is published
    assert planned["mesh"] and planned["devices"] == 8


def test_a_step_that_is_too_large_is_a_result_not_an_error(monkeypatch):
    whole = plan(settings(*CPU, "mesh.data=8"), "cpu:8")
    limit = whole["peak_bytes"] - 1000
    with_memory(monkeypatch, limit)
    found = plan(settings(*CPU, "mesh.data=8"), "cpu:8")
    assert (found["fits"], found["headroom_bytes"]) == (False, -1000)


def test_the_largest_batch_is_a_multiple_of_what_divides(monkeypatch):
    asked = settings(*CPU, "mesh.data=8", "accumulate_steps=2")
    compiled_sizes = []

    def analyse(settings, target, devices):  # 1,000 bytes an image
        compiled_sizes.append(settings.batch_size)
        analysis = {"mesh": {"data": 8}, "peak_bytes": 1000 * settings.batch_size, "compile_seconds": 1.0}
        return analysis | {"step_ms": None, "images_per_second": None}

    monkeypatch.setattr(verb, "_compiled_analysis", analyse)
    with_memory(monkeypatch, 500_000)
    found = plan(asked, "cpu:8", largest_batch=True)
    assert (found["batch_size"], found["overrides"]) == (496, ["batch_size=496", "model.remat=none"])  # 31 times 16
    assert 512 in compiled_sizes
    with_memory(monkeypatch, 15_000)
    with pytest.raises(ConfigError, match="--batch-size=max: even a batch of 16.* needs 1,000 bytes more"):
        plan(asked, "cpu:8", largest_batch=True)


def test_a_search_returns_overrides_and_all_of_it_can_be_shown(monkeypatch, capfd, tmp_path):
    words = ["plan", f"--config={RECIPE}", "--target=cpu:8", *(f"--config.{one}" for one in CPU)]
    assert cli.main([*words, "--json"]) == 0
    own = json.loads(capfd.readouterr().out)
    made = {name: own[name] for name in (*KEYS, "mesh", "flops", "binds", "network_ms", "traffic", "efficiencies")}
    made |= {"headroom_bytes": own["headroom_bytes"], "compile_seconds": 1.0}
    monkeypatch.setattr(verb, "_compiled_analysis", lambda settings, target, devices: dict(made))
    page = tmp_path / "plan.html"
    assert cli.main([*words, "--search", f"--html={page}", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["fits"] is True and set(own) | {"ranking", "fallen", "smallest"} == set(found)
    (choice,) = [row for row in found["ranking"] if row["note"] == "the choice"]
    assert choice["overrides"] == found["overrides"]
    assert "the choice" in page.read_text()
    assert any("the choice" in row for _, rows in report.tables(found) for row in rows)
    made["fits"] = False
    assert cli.main([*words, "--search", "--json"]) == 0
    nothing = json.loads(capfd.readouterr().out)
    assert nothing["fits"] is False
    assert sorted(nothing["overrides"]) == sorted(nothing["smallest"]["overrides"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("XLA's compiler cannot make this program: INTERNAL"), "^XLA's compiler cannot make"),
        (ValueError("groups of no axes"), "--target=cpu:8: the compiled program cannot be read: groups of no axes"),
    ],
)
def test_a_step_that_cannot_be_compiled_or_read_is_an_error_with_the_reason(error, said, monkeypatch):
    def fails(program):
        raise error

    monkeypatch.setattr(verb, "compile_step", fails)
    with pytest.raises(ConfigError, match=said):
        plan(settings(*CPU, "mesh.data=8"), "cpu:8")


def test_no_data_are_opened():
    asked = settings(*CPU, "mesh.data=8", "data.source=folder", "data.path=/no/such/folder")
    assert plan(asked, "cpu:8")["fits"] is True


def test_an_unknown_number_of_classes_is_assumed_and_logged(caplog):
    plan(settings(*CPU, "mesh.data=8", "model.num_classes=null"), "cpu:8")
    assert "1000 assumed" in caplog.text


def test_overrides_turn_one_config_into_another():
    one, other = settings(), settings("mesh.data=2", "model.scan=false", "model.remat=block", "model.layer_scale=1e-4")
    changed = changed_keys(one, other)
    assert overridden(one, changed) == other
    assert set(changed) >= {"model.remat=block", "mesh.data=2"}


def test_the_batch_is_checked_against_the_mesh():
    with pytest.raises(ConfigError, match="batch_size: 60 does not divide"):
        plan(settings(*CPU, "mesh.data=8", "batch_size=60"), "cpu:8")


def test_search_and_largest_batch_exclude_each_other():
    with pytest.raises(ConfigError, match="give it or --batch-size=max, not both"):
        plan(settings(*CPU), "cpu:8", search=True, largest_batch=True)


def test_the_command_prints_a_table_json_and_a_page(capfd, tmp_path):
    words = ["plan", f"--config={RECIPE}", "--target=cpu:8", *(f"--config.{one}" for one in CPU)]
    page = tmp_path / "plan.html"
    assert cli.main([*words, f"--html={page}"]) == 0
    shown = capfd.readouterr().out
    assert "all-reduce" in shown and "temporaries" in shown and "fits" in shown
    assert "<html" in page.read_text() and "cpu:8" in page.read_text()
    assert cli.main([*words, "--json"]) == 0
    (line,) = capfd.readouterr().out.splitlines()
    assert json.loads(line)["fits"] is True


def test_the_command_lists_the_targets(capfd):
    assert cli.main(["plan", "--targets"]) == 0
    shown = capfd.readouterr().out
    assert all(name in shown for name in ("v5e", "v5p", "v6e", "h100", "h200", "cpu"))
    assert cli.main(["plan", "--targets", "--json"]) == 0
    assert {"v5e", "h200"} <= {row["name"] for row in json.loads(capfd.readouterr().out)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target=v5e:3x5"], "4x4"),
        (["--target=h200:8x0"], "GxN for N nodes of G GPUs"),
        (["--target=tpu:9"], "v5e"),
        (["--target=cpu:8", "--slices=2"], "--slices"),
        (["--target=cpu:8", "--html=/no/such/folder/plan.html"], "cannot be written: there is no folder"),
        (["--target=cpu:8", "--html=/"], "is a folder"),
        (["--target=cpu:8", "--config.mesh.data=2"], "takes 2 of the target's 8 devices"),
        (["--target=cpu:3"], "mesh"),
    ],
)
def test_usage_errors_are_one_line(words, said, capfd):
    extra = ["--config.mesh.data=4"] if "cpu:3" in words[0] else []
    assert cli.main(["plan", f"--config={RECIPE}", *words, *extra]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    (line,) = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert said in line


def test_config_and_target_are_both_required(capfd):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--target=cpu:8"])
    assert ended.value.code == 2
    assert capfd.readouterr().err.startswith("error: --config and --target")


def test_a_run_begins_with_lines_for_memory_bounds_and_time():
    planned = {
        "memory": {"parameters": 2**30, "ema": 0, "temporaries": 3 * 2**29},
        "peak_bytes": 5 * 2**29,
        "device_bytes": 2**34,
        "bounds_ms": {"arithmetic": 12.5, "memory": 3.0, "network": None},
        "flops": {"model": 1e12, "hardware": 2e12},
        "step_ms": 20.0,
        "images_per_second": 3200.0,
        "mfu": 0.5,
        "hours": 1.25,
        "dtype": "bfloat16",
        "steps": 225_000,
    }
    memory, bounds, likely = report.lines(planned)
    assert memory == "plan: a device needs 2.50 GiB of 16.00 GiB: parameters 1.00 GiB, temporaries 1.50 GiB"
    assert "2 TFLOP" in bounds and bounds.endswith("at least: arithmetic 12.5 ms, memory 3 ms")
    assert likely == "plan: likely 20 ms a step, 3,200 images/s, MFU 50%, 1.2 hours for 225,000 steps"


def test_it_is_a_function_of_the_package_too():
    assert vit_dist.plan is plan


def with_memory(monkeypatch, limit):
    """Gives the devices of `cpu:8` so many bytes each."""
    parse = targets.parse

    def smaller(text, slices=1):
        target = parse(text, slices)
        return dataclasses.replace(target, chip=dataclasses.replace(target.chip, memory_bytes=limit))

    monkeypatch.setattr(targets, "parse", smaller)

"""What the parts of a visit make of what they measure: traces, attention, curves, checkpoints, plans, pages."""

import contextlib
import importlib.util
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData
from visit import attention, golden, models, ours, peer, report, resume, trace
from visit.job import Job, Skipped

# Ten microseconds of a GPU: two streams, whose kernels overlap, and a line that was derived from them.
GPU = """
planes {
  name: "/device:GPU:0"
  lines {
    name: "Stream #13(Compute)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 3000000 }
    events { metadata_id: 2 offset_ps: 4000000 duration_ps: 1000000 }
    events { metadata_id: 1 offset_ps: 9000000 duration_ps: 1000000 }
  }
  lines {
    name: "Stream #14(MemcpyD2D)" timestamp_ns: 1000
    events { metadata_id: 3 offset_ps: 2000000 duration_ps: 2000000 }
  }
  lines { name: "XLA Ops" timestamp_ns: 1000 events { metadata_id: 2 offset_ps: 0 duration_ps: 10000000 } }
  event_metadata { key: 1 value { id: 1 name: "nvjet_hsh_128x256_gemm" } }
  event_metadata { key: 2 value { id: 2 name: "loop_add_fusion_7" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyD2D" } }
}
planes { name: "/host:CPU" lines { name: "python" events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 } }
  event_metadata { key: 1 value { id: 1 name: "call" } } }
"""


def job(tmp_path, **arguments):
    folders = {name: str(tmp_path) for name in ("kit", "scratch", "out")}
    return Job({"arguments": arguments, "dry_run": True, **folders}, tmp_path / "result.json")


def outcome(tmp_path):
    return json.loads((tmp_path / "result.json").read_text())


def test_a_gpus_trace_is_the_kernels_of_its_streams_and_nothing_else():
    found = trace.of_data(ProfileData.from_text_proto(GPU))
    assert [(one.name, one.ns) for one in found] == [
        ("nvjet_hsh_128x256_gemm", 3000),
        ("MemcpyD2D", 2000),
        ("loop_add_fusion_7", 1000),
        ("nvjet_hsh_128x256_gemm", 1000),
    ]


def test_kernels_are_summed_by_name_and_gaps_are_where_none_runs():
    found = trace.summary(trace.of_data(ProfileData.from_text_proto(GPU)), steps=2)
    assert found["kernels_per_step"] == 2
    assert found["busy_ms"] == pytest.approx(6e-3 / 2)  # 0 to 5 us, and 9 to 10
    assert found["span_ms"] == pytest.approx(10e-3 / 2)
    assert found["idle_share"] == pytest.approx(0.4) and found["longest_gap_us"] == pytest.approx(4)
    assert found["long_gaps_per_step"] == 0
    first = found["top"][0]
    assert (first["name"], first["per_step"], first["ms"]) == ("nvjet_hsh_128x256_gemm", 1, pytest.approx(2e-3))
    assert first["percent"] == pytest.approx(100 * 4 / 6)
    assert [one["name"] for one in found["families"]] == ["products", "copies and fills", "fusions"]


def test_no_more_than_25_kernels_are_listed():
    many = [trace.Kernel(f"kernel {i}", 1000.0 * i, float(i)) for i in range(40)]
    found = trace.summary(many, steps=1)
    assert [one["name"] for one in found["top"]] == [f"kernel {i}" for i in range(39, 14, -1)]
    assert len(found["families"]) == 1 and found["families"][0]["per_step"] == 40


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("nvjet_tst_192x192_64x4_1x2_h_bz_coopB_NNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("input_reduce_fusion_12", "reductions"),
        ("loop_multiply_fusion_3", "fusions"),
        ("Memset", "copies and fills"),
        ("wrapped_add", "other"),
    ],
)
def test_a_kernels_name_tells_what_kind_of_work_it_does(name, family):
    assert trace.family(name) == family


def test_a_trace_of_this_cpu_has_the_operations_that_ran(tmp_path):
    product = jax.jit(lambda x: jnp.tanh(x @ x))
    x = jnp.ones((64, 64))
    jax.block_until_ready(product(x))
    with jax.profiler.trace(tmp_path):
        for _ in range(3):
            x = product(x)
        jax.block_until_ready(x)
    (file,) = tmp_path.rglob("*.xplane.pb")
    assert any(line.startswith("/host:CPU / ") for line in trace.outline(file))
    found = trace.summary(trace.kernels(file), steps=3)
    assert [one["per_step"] for one in found["top"] if "tanh" in one["name"]] == [1]
    assert 0 < found["busy_ms"] <= found["span_ms"]


def test_attention_is_compared_in_value_and_in_gradient(tmp_path):
    attention.run(job(tmp_path, tokens=[5], examples=2, heads=2, head_size=8))
    errors = outcome(tmp_path)["result"]["errors"]["5"]
    assert errors["cudnn"] == errors["xla"]  # on a CPU the one stands in for the other
    assert all(1e-4 < error < 1e-2 for error in errors["xla"].values())
    assert len(outcome(tmp_path)["checks"]) == 4 and all(one["holds"] for one in outcome(tmp_path)["checks"])


def test_attention_that_is_wrong_or_no_number_fails(tmp_path, monkeypatch):
    real = attention.outputs

    def spoilt(implementation, *arrays):
        output, query, key, value = real(implementation, *arrays)
        wrong = arrays[0].dtype == jnp.bfloat16
        return output, query * (1.05 if wrong else 1), key * (jnp.nan if wrong else 1), value

    monkeypatch.setattr(attention, "outputs", spoilt)
    attention.run(job(tmp_path, tokens=[5], examples=2, heads=2, head_size=8))
    # XLA's stands in for cuDNN's and is as wrong, so the bound of twice its error holds: only the NaN is left to see
    assert [one["holds"] for one in outcome(tmp_path)["checks"]] == [True, True, False, True]


def test_the_rows_of_the_golden_run_are_compared_one_by_one():
    rows = [{"loss": 2.0, "grad_norm": 1.0, "param_norm": 4.0}, {"loss": 1.0, "grad_norm": 2.0, "param_norm": 4.0}]
    other = [rows[0], {**rows[1], "loss": 1.001, "grad_norm": 1.98}]
    found = golden.differences(other, rows)
    assert found == {"loss": pytest.approx(1e-3), "grad_norm": pytest.approx(1e-2), "param_norm": 0.0}


CLAIMS = ["the examples", *golden.COMPARED]


@pytest.mark.parametrize(
    ("found", "false"),
    [
        ({"loss": 2 * (1 + 0.9e-4), "grad_norm": 1 - 0.9e-4, "param_norm": 4 * (1 + 0.9e-4)}, []),
        ({"loss": 2 * (1 + 1.1e-4)}, ["loss"]),
        ({"grad_norm": 1 - 1.1e-4}, ["grad_norm"]),
        ({"param_norm": 4 * (1 + 1.1e-4)}, ["param_norm"]),
        ({"loss": float("nan")}, ["loss"]),
        ({"examples": "b"}, ["the examples"]),
    ],
)
def test_rows_that_are_not_the_cpus_to_one_in_ten_thousand_are_refused(tmp_path, monkeypatch, found, false):
    row = {"loss": 2.0, "grad_norm": 1.0, "param_norm": 4.0, "examples": "a"}
    (tmp_path / golden.DATA).touch()
    (tmp_path / golden.ROWS).write_text(json.dumps({"jax": "1.2", "rows": [row, row]}))
    monkeypatch.setattr(golden, "rows", lambda data, precision: [row, row | found])
    golden.run(job(tmp_path))
    checks = outcome(tmp_path)["checks"]
    assert [name for name, one in zip(CLAIMS, checks, strict=True) if not one["holds"]] == false


class Still:
    """A trainer whose steps do nothing."""

    program = SimpleNamespace(flops_per_step=lambda: 1)

    def __init__(self, loss):
        self.block = lambda: loss
        self.step = lambda: None
        self.in_use = contextlib.nullcontext

    def compile(self):
        return SimpleNamespace(memory_analysis=lambda: None)

    def parameters(self):
        return 1


@pytest.mark.parametrize(
    ("loss", "grown", "holds"),
    [(1.0, 0, [True, True]), (1.0, -1, [True, True]), (1.0, 1, [True, False]), (float("nan"), 0, [False, True])],
)
def test_a_step_whose_memory_grows_or_whose_loss_is_no_number_is_refused(tmp_path, monkeypatch, loss, grown, holds):
    held = iter((1000, 1000 + grown, 0))  # after the warm-up, after all steps, and for the peak

    def stats():
        return {"bytes_in_use": next(held), "peak_bytes_in_use": 2000}

    device = SimpleNamespace(device_kind="NVIDIA X", process_index=0, memory_stats=stats)
    monkeypatch.setattr(Job, "device", lambda self: device)
    monkeypatch.setattr(ours, "make", lambda told: Still(loss))
    ours.throughput(job(tmp_path, batch=8, settle=1, steps=1, rounds=1))
    found = outcome(tmp_path)
    assert [one["holds"] for one in found["checks"]] == holds
    assert found["result"]["held_bytes"] == [1000, 1000 + grown] and found["result"]["peak_bytes"] == 2000


def test_without_a_kit_the_golden_run_is_skipped(tmp_path):
    with pytest.raises(Skipped, match=r"the kit has no golden.json; make visit-kit"):
        golden.run(job(tmp_path))


def test_without_pytorch_timms_part_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Skipped, match="torch is not installed"):
        peer.run(job(tmp_path))


def test_arrays_are_compared_to_the_bit():
    one = {"a": np.array([0.0, 1.0], np.float32), "b": np.array([1], np.int32)}
    assert resume.compare(one, {"a": np.array([-0.0, 1.0], np.float32), "b": one["b"]}) == (["a"], 2)
    assert resume.compare(one, dict(one)) == ([], 2)


def full_record():
    """A visit to a card that does not exist, all its parts done."""
    rows = [{"name": "gemm|1", "per_step": 12.0, "ms": 1.5, "percent": 60.0}]
    profile = {"kernels_per_step": 900.0, "busy_ms": 90.0, "span_ms": 100.0, "idle_share": 0.1, "top": rows}
    profile |= {"long_gaps_per_step": 3.0, "longest_gap_us": 44.0, "families": rows}
    ours = {"batch": 256, "step_ms": [99.0, 100.0, 104.0], "images_per_second": 2560.0, "peak_bytes": 22 * 2**30}
    ours |= {"compile_seconds": 31.0, "compiled_bytes": 21 * 2**30, "flops_per_step": 40e12, "peak_flops": 1000e12}
    timm = {"batch": 256, "step_ms": [200.0], "images_per_second": 1280.0, "peak_bytes": None}
    rates = {"median": 800.0, "least": 790.0, "most": 810.0}
    errors = dict.fromkeys(attention.NAMES, 2e-3)
    both = {"differences": {"loss": 1e-6, "grad_norm": 2e-6, "param_norm": 3e-7}}
    results = {
        "machine": {"device_kind": "NVIDIA X", "versions": {"jax": "1.2"}, "nvidia_smi": "X, 580", "cores": 16},
        "ceilings": {"product_side": 8192, "product_tflops": rates, "copy_gbs": rates},
        "b16": ours,
        "b16_timm": timm | {"first_step_seconds": 50.0},
        "golden": {"rows_made_with": "jax 1.2 on a CPU", "highest": both, "default": both},
        "attention": {"errors": {"197": {"cudnn": errors, "xla": errors}}},
        "profile": profile,
        "loader": {"cores": 16, "size": 224, "rates": {"pillow": {"images_per_second": 500.0, "a_cpu_second": 510.0}}},
    }
    parts = {
        name: {"status": "ok", "seconds": 9.0, "expected_seconds": 10, "result": one} for name, one in results.items()
    }
    parts["golden"]["checks"] = [{"claim": "loss is the CPU's", "holds": False, "found": "3e-3"}]
    parts["resume"] = {"status": "failed", "expected_seconds": 60, "reason": "ended by SIGABRT", "log": ["abort: why"]}
    plan = {"device_kind": "NVIDIA X", "target": "x:1", "jax": "1.1", "peak_bytes": 20 * 2**30, "step_ms": 80.0}
    other = {"b16": {**plan, "device_kind": "NVIDIA Y"}}
    record = {"time": "2026-12-01T10:00:00", "dry_run": False, "seconds": 400.0, "budget_seconds": 420.0}
    return record | {"parts": parts, "plans": [other, {"b16": plan, "s16": plan}]}


@pytest.mark.parametrize(
    "line",
    [
        "# A visit to NVIDIA X, 2026-12-01",
        "| bf16 product of 8192 x 8192 | 800 TFLOP/s | 790 to 810 |",
        "| b16 | 256 | 2,560 | 100 | 99 to 104 |  | 40.0% | 50.0% | 22.00 | 31.0 |",
        "| b16_timm | 256 | 1,280 | 200 | 200 to 200 | 2.000 | 20.0% | 25.0% | - | 50.0 |",
        "| b16 | 20.00 | 21.00 | 22.00 | 1.100 | 80 | 100 | 1.250 | x:1, jax 1.1 |",
        "| golden | loss is the CPU's | **NO** | 3e-3 |",
        "| float32 proper | 1.0e-06 | 2.0e-06 | 3.0e-07 |",
        "| 197 | cudnn | 2.0e-03 | 2.0e-03 | 2.0e-03 | 2.0e-03 |",
        "900 kernels a step; 90 of 100 ms busy, 10.0% idle; "
        "3 gaps of more than 10 us a step, the longest of all 44 us.",
        "| `gemm/1` | 12 | 1.5 | 60 |",
        "| pillow | 500 | 510 |",
        "| resume | failed | - | 60 | ended by SIGABRT |",
        "    abort: why",
    ],
)
def test_the_page_says(line):
    assert line in report.markdown(full_record()).splitlines()


def test_whatever_part_of_a_record_is_missing_there_is_a_page():
    whole = full_record()
    for name in whole["parts"]:
        for part in (
            {"status": "not begun", "expected_seconds": 1},
            {"status": "running", "expected_seconds": 1, "result": {}},
        ):
            page = report.markdown({**whole, "parts": {**whole["parts"], name: part}})
            assert f"| {name} | {part['status']} | - | 1 |  |" in page
    bare = {"time": "2026-12-01", "dry_run": True, "seconds": 0.0, "budget_seconds": 1.0, "parts": {}}
    assert report.markdown(bare).startswith("# A dry run on a machine that did not say what it is")


@pytest.mark.parametrize("scan", [False, True])
def test_a_drawn_state_is_of_the_kind_that_the_program_makes_and_trains(scan):
    trainer = ours.make({"model": "mu/16", "batch": 8, "image": 32, "scan": scan})
    with trainer.in_use():
        made, drawn = trainer.program.new_state(), models.drawn_state(trainer.program)
        assert jax.tree.map(jax.typeof, made) == jax.tree.map(jax.typeof, drawn)
        scales = [leaf for path, leaf in jax.tree.leaves_with_path(drawn.parameters) if "scale" in str(path[-1])]
        assert len(scales) >= 1 and all((leaf == 1).all() for leaf in scales)
        trainer.step()
        first = trainer.block()
        for _ in range(10):
            trainer.step()
        assert trainer.block() < first

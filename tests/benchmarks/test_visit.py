"""The visit to a GPU as a runner: however a part ends, the others run, and what was found is on the disk."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import gpu_visit
import pytest
from pids import alive, wait_until_gone
from visit import parts, runner
from visit.job import Job
from visit.runner import Part, Visit

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(autouse=True)
def fakes_can_be_found(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HELPERS))


def part(name, seconds=1.0, **arguments):
    return Part(name, f"fake_parts:{name.partition(' ')[0]}", seconds, arguments)


def visit_to(folder, *, budget=60.0, dry_run=False, cache=None):
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    return Visit(folder / "out", scratch=scratch, kit=folder / "kit", budget=budget, dry_run=dry_run, cache=cache)


def record(folder):
    return json.loads((folder / "out" / "visit.json").read_text())


def statuses(folder):
    return {name: one["status"] for name, one in record(folder)["parts"].items()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A visit whose parts end in every way but by a limit."""
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HELPERS))
        names = ("aborts", "raises", "vanishes", "skips", "is_wrong")
        visit_to(folder).run_all([part("works", number=7), *map(part, names), part("works again", number=8)])
    return folder


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("works", "ok", None),
        ("aborts", "failed", "ended by SIGABRT"),
        ("raises", "failed", "exit code 1: ValueError: no such thing"),
        ("vanishes", "failed", "it ended without a word"),
        ("skips", "skipped", "nothing to run on"),
        ("is_wrong", "failed", "two is three: 2 of 3"),
        ("works again", "ok", None),
    ],
)
def test_however_a_part_ends_it_is_said_and_the_next_one_runs(mixed, name, status, reason):
    noted = record(mixed)["parts"][name]
    assert (noted["status"], noted["reason"]) == (status, reason)
    assert noted["seconds"] is not None and noted["expected_seconds"] == 1


def test_what_a_part_had_found_before_it_failed_is_kept(mixed):
    found = record(mixed)["parts"]
    assert [found[name]["result"] for name in ("aborts", "raises", "is_wrong")] == [{"before": 1}] * 3
    assert "ValueError: no such thing" in found["raises"]["log"][-1]


def test_parts_run_in_their_order_with_their_own_arguments(mixed):
    found, log = record(mixed)["parts"], (mixed / "out" / "log.txt").read_text()
    assert [line.removeprefix("===== ") for line in log.splitlines() if line.startswith("=====")] == list(found)
    assert [found[name]["result"] for name in ("works", "works again")] == [{"answer": 7}, {"answer": 8}]


def test_the_results_are_a_few_files_and_the_page_names_every_part(mixed):
    assert sorted(one.name for one in (mixed / "out").iterdir()) == ["log.txt", "visit.json", "visit.md"]
    page, log = ((mixed / "out" / name).read_text() for name in ("visit.md", "log.txt"))
    assert all(f"| {name} | {one['status']} |" in page for name, one in record(mixed)["parts"].items())
    assert "===== raises\nTraceback" in log


def test_a_part_that_hangs_is_stopped_with_all_that_it_started(tmp_path):
    visit_to(tmp_path, budget=5.0).run_all([part("hangs")])
    noted = record(tmp_path)["parts"]["hangs"]
    assert noted["status"] == "failed" and noted["reason"].startswith("stopped after ")
    assert noted["seconds"] < 10
    wait_until_gone(noted["result"]["processes"])


def test_a_part_that_does_not_fit_in_the_budget_is_left_out_and_a_shorter_one_is_not(tmp_path):
    parts = [part("works", number=1), part("works long", seconds=50, number=2), part("works short", number=3)]
    visit_to(tmp_path, budget=30.0).run_all(parts)
    assert statuses(tmp_path) == {"works": "ok", "works long": "left out", "works short": "ok"}
    assert "it should take 50 s, and " in record(tmp_path)["parts"]["works long"]["reason"]


def test_a_visit_that_is_killed_leaves_what_it_has_found(tmp_path):
    code = (
        "import sys; from pathlib import Path; from visit.runner import Part, Visit\n"
        f"visit = Visit(Path({str(tmp_path / 'out')!r}), scratch=Path({str(tmp_path)!r}), kit=Path('none'), "
        "budget=600.0, dry_run=False)\n"
        "visit.run_all([Part(name, f'fake_parts:{name}', 1.0, {'number': 1}) for name in ('works', 'hangs', 'skips')])"
    )
    path = f"{runner.BENCHMARKS}:{HELPERS}"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    hanging = tmp_path / "hangs.json"  # what the part itself has written
    try:
        deadline = time.monotonic() + 60
        while not hanging.exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    try:
        assert statuses(tmp_path) == {"works": "ok", "hangs": "running", "skips": "not begun"}
        assert record(tmp_path)["parts"]["works"]["result"]["answer"] == 1
    finally:
        for pid in json.loads(hanging.read_text())["result"]["processes"]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_compiled_programs_go_from_one_visit_to_the_next_jaxs_first_as_far_as_a_file_may_be_large(tmp_path):
    most = runner.MOST_FILE
    files = {"torch/one": most // 2, "jax/one": most // 2, "jax/two": 1000, "torch/two": most // 3, "triton/one": 10}
    visit_to(tmp_path / "first").run_all([part("compiles", files=files)])
    archive = tmp_path / "first" / "out" / "cache.tar.gz"
    assert archive.stat().st_size <= most
    with tarfile.open(archive) as packed:
        names = packed.getnames()
    assert names == ["jax/one", "jax/two", "torch/two", "triton/one"]
    assert record(tmp_path / "first")["cache"] == {"bytes": most // 2 + most // 3 + 5106, "files": 4, "left_out": 1}
    visit_to(tmp_path / "second", cache=archive).run_all([part("finds")])
    assert record(tmp_path / "second")["parts"]["finds"]["result"] == {"files": names}


def earlier_visit(kind="NVIDIA X", **parts):
    machine = {"status": "ok", "result": {"device_kind": kind}}
    return {"time": "yesterday", "dry_run": False, "parts": {"machine": machine, **parts}}


def test_what_went_well_on_the_same_kind_of_card_is_not_done_again(tmp_path):
    asked = [part("works", number=1), part("works again", number=2), part("raises"), part("skips")]
    before = {name: {"status": "ok", "reason": None, "result": {"old": 1}} for name in ("works", "works again")}
    before["works"]["arguments"], before["works again"]["arguments"] = {"number": 1}, {"number": 5}
    visit = visit_to(tmp_path)
    visit.record["parts"]["machine"] = {"status": "ok", "result": {"device_kind": "NVIDIA X"}, "expected_seconds": 1}
    visit.take_over(earlier_visit(**before, raises={"status": "failed"}), asked)
    visit.run_all(asked)
    assert {name: statuses(tmp_path)[name] for name in ("works", "works again", "raises", "skips")} == {
        "works": "earlier",
        "works again": "ok",  # its arguments are others now
        "raises": "failed",
        "skips": "skipped",
    }
    noted = record(tmp_path)["parts"]["works"]
    assert noted["result"] == {"old": 1} and noted["reason"] == "in the visit of yesterday"


def test_nothing_is_taken_over_from_another_card(tmp_path, capsys):
    visit = visit_to(tmp_path)
    visit.record["parts"]["machine"] = {"status": "ok", "result": {"device_kind": "NVIDIA Y"}, "expected_seconds": 1}
    visit.take_over(earlier_visit(works={"status": "ok", "arguments": {}}), [part("works")])
    assert list(visit.parts) == ["machine"]
    assert "the earlier visit was to NVIDIA X, and this is NVIDIA Y" in capsys.readouterr().err


def test_a_dry_run_takes_the_tiny_sizes_and_keeps_no_budget():
    one = Part("x", "y:z", 50.0, {"side": 8192, "rounds": 7}, {"side": 128})
    assert one.sizes(dry_run=False) == {"side": 8192, "rounds": 7}
    assert one.sizes(dry_run=True) == {"side": 128, "rounds": 7}


def test_where_there_is_no_gpu_one_line_says_so(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert gpu_visit.main([f"--out={tmp_path / 'out'}"]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("machine: ")]
    assert errors == ["error: jax sees no GPU here, but a cpu; see --dry-run"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--parts=b17"], "--parts: 'b17' is none of ceilings, b16, "),
        (["--cache=nowhere.tar.gz"], "--cache: no archive: nowhere.tar.gz"),
        (["--earlier=nowhere.json"], "--earlier: no such file: nowhere.json"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(tmp_path, capsys, words, error):
    assert gpu_visit.main([f"--out={tmp_path}", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {error}")


def test_every_part_has_its_function_and_a_tiny_size_for_what_is_large():
    assert len(parts.BY_NAME) == len(parts.PARTS) + 1
    for one in (parts.MACHINE, *parts.BY_NAME.values()):
        module, _, name = one.function.partition(":")
        source = (runner.BENCHMARKS / f"{module.replace('.', '/')}.py").read_text()
        assert f"\ndef {name}(job: Job) -> None:" in source, one.name
        assert one.arguments.keys() >= one.tiny.keys() - {"shape", "settle", "rounds"}, one.name


def test_the_first_visit_has_room_for_all_of_our_own_and_the_second_for_the_rest():
    seconds, left = parts.MACHINE.seconds, []
    for one in parts.PARTS:
        if seconds + one.seconds <= 420:
            seconds += one.seconds
        else:
            left.append(one)
    assert {"ceilings", "b16", "b16_timm", "golden", "attention", "resume", "s16", "l16"}.isdisjoint(
        one.name for one in left
    )
    assert parts.MACHINE.seconds + sum(one.seconds for one in left if one.name != "b16_scan") <= 180


def test_a_part_that_needs_a_gpu_does_not_take_a_cpu_for_one(tmp_path):
    orders = {"arguments": {}, "kit": "kit", "scratch": str(tmp_path), "out": str(tmp_path)}
    with pytest.raises(RuntimeError, match="jax sees no GPU"):
        Job({**orders, "dry_run": False}, tmp_path / "result.json").device()
    assert Job({**orders, "dry_run": True}, tmp_path / "result.json").device().platform == "cpu"

"""The visit to a GPU as a runner: however a part ends, the others run, and what was found is on the disk."""

import errno
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
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
    visit = Visit(folder / "out", scratch=scratch, kit=folder / "kit", budget=budget, dry_run=dry_run, cache=cache)
    visit.begin()
    return visit


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
        "visit.begin()\n"
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


def result(folder, name):
    return record(folder)["parts"][name]["result"]


@pytest.mark.parametrize(
    ("number", "code", "later"), [(signal.SIGTERM, 143, {"skips": "not begun"}), (signal.SIGINT, 130, {})]
)
def test_a_signal_ends_the_part_that_runs_and_the_visit_and_keeps_what_was_found(tmp_path, number, code, later):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    program = (
        "import sys, gpu_visit; from visit import parts; from visit.runner import Part\n"
        "parts.MACHINE = Part('machine', 'fake_parts:is_a_gpu', 1.0)\n"
        f"parts.PARTS = [Part(name, 'fake_parts:' + name, 1.0, {{'number': 1}}) "
        f"for name in {('works', 'hangs', *later)}]\n"
        f"sys.exit(gpu_visit.main(['--out={tmp_path / 'out'}']))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{runner.BENCHMARKS}:{HELPERS}", "TMPDIR": str(temporary)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    hanging = []
    try:
        deadline = time.monotonic() + 60
        while not (files := list(temporary.glob("gpu-visit-*/hangs.json"))):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        hanging = json.loads(files[0].read_text())["result"]["processes"]
        process.send_signal(number)
        said = process.communicate(timeout=30)[1]
        wait_until_gone(hanging)
    finally:
        process.kill()
        process.wait()
        for pid in filter(alive, hanging):
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == code and said.splitlines()[-1] == f"ended by {number.name}"
    assert result(tmp_path, "hangs")["processes"] == hanging
    assert list(temporary.iterdir()) == []
    assert statuses(tmp_path) == {"machine": "ok", "works": "ok", "hangs": "failed", **later}
    assert record(tmp_path)["parts"]["hangs"]["reason"] == f"stopped by {number.name}"
    assert "| hangs | failed | " in (tmp_path / "out" / "visit.md").read_text()


def test_a_file_that_vanishes_while_programs_are_packed_is_said_and_the_next_pack_is_whole(
    tmp_path, capsys, monkeypatch
):
    pack, scratch = tarfile.open, tmp_path / "scratch"

    def open_late(*words, **more):
        (scratch / "cache" / "jax" / "brief").unlink(missing_ok=True)
        return pack(*words, **more)

    monkeypatch.setattr(tarfile, "open", open_late)
    parts = [part("compiles", files={"jax/brief": 10, "jax/one": 10}), part("works", number=1)]
    visit_to(tmp_path).run_all(parts)
    assert statuses(tmp_path) == {"compiles": "ok", "works": "ok"}
    assert "the compiled programs could not be kept: [Errno 2] No such file" in capsys.readouterr().err
    with pack(tmp_path / "out" / "cache.tar.gz") as packed:
        assert packed.getnames() == ["jax/one"]


def test_a_disk_that_is_full_is_said_and_the_next_part_runs(tmp_path, capsys, monkeypatch):
    visit, put = visit_to(tmp_path), os.replace

    def full(source, target):
        if visit.parts["works"]["status"] == "ok":
            raise OSError(errno.ENOSPC, "No space left on device")
        put(source, target)

    monkeypatch.setattr(os, "replace", full)
    visit.run_all([part("works", number=1), part("works again", number=2)])
    assert {name: one["status"] for name, one in visit.parts.items()} == {"works": "ok", "works again": "ok"}
    assert not visit.page_is_whole
    assert "the results could not be kept: [Errno 28] No space left on device" in capsys.readouterr().err
    assert statuses(tmp_path) == {"works": "running", "works again": "not begun"}  # older, and whole
    assert [one.name for one in (tmp_path / "out").iterdir() if one.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("folder", "status", "said"),
    [("out", "ok", "the results could not be kept: "), ("scratch", "failed", "works: failed after 0 s: it could not")],
)
def test_a_folder_that_vanishes_does_not_end_the_visit(tmp_path, capsys, folder, status, said):
    visit = visit_to(tmp_path)
    visit.run_all([part("removes", folder=folder), part("works", number=1)])
    assert visit.parts["works"]["status"] == status
    assert said in capsys.readouterr().err
    assert not visit.page_is_whole


def test_a_kit_that_cannot_be_read_is_said_and_the_visit_begins(tmp_path, capsys):
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "plans.json").write_text("{")
    visit_to(tmp_path).run_all([part("works", number=1)])
    assert statuses(tmp_path) == {"works": "ok"} and record(tmp_path)["plans"] is None
    assert "plans.json cannot be read: " in capsys.readouterr().err


def test_a_program_that_jax_has_compiled_in_one_visit_is_found_in_the_next(tmp_path):
    visit_to(tmp_path / "first").run_all([part("compiles_with_jax")])
    archive = tmp_path / "first" / "out" / "cache.tar.gz"
    visit_to(tmp_path / "second", cache=archive).run_all([part("compiles_with_jax")])
    found = [result(tmp_path / name, "compiles_with_jax") for name in ("first", "second")]
    assert found == [{"cache_hits": 0, "cache_misses": 1}, {"cache_hits": 1, "cache_misses": 0}]


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


def test_where_there_is_no_gpu_one_line_says_so_and_earlier_results_stay(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (tmp_path / "visit.json").write_text("earlier")
    assert gpu_visit.main([f"--out={tmp_path}", "--parts=ceilings"]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("machine: ")]
    assert errors == ["error: jax sees no GPU here, but a cpu; see --dry-run"]
    assert [one.name for one in tmp_path.iterdir()] == ["visit.json"]
    assert (tmp_path / "visit.json").read_text() == "earlier"


def test_a_machine_without_jax_is_one_line_below_what_its_part_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(parts, "MACHINE", part("raises"))
    assert gpu_visit.main([f"--out={tmp_path}"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "error: jax cannot be used here: exit code 1: ValueError: no such thing"
    assert "Traceback (most recent call last):" in said


def fake_visit(monkeypatch, *chosen):
    """The parts of a visit to a GPU that does not exist."""
    monkeypatch.setattr(parts, "MACHINE", Part("machine", "fake_parts:is_a_gpu", 1.0))
    monkeypatch.setattr(parts, "PARTS", chosen)
    monkeypatch.setattr(parts, "BY_NAME", {one.name: one for one in chosen})


def test_an_earlier_visit_may_lie_where_the_next_one_writes(tmp_path, monkeypatch):
    out = tmp_path / "out"
    fake_visit(monkeypatch, part("compiles", files={"jax/one": 10}), part("works", number=1))
    assert gpu_visit.main([f"--out={out}", "--parts=compiles"]) == 0
    again = [f"--out={out}", f"--earlier={out / 'visit.json'}", f"--cache={out / 'cache.tar.gz'}"]
    assert gpu_visit.main(again) == 0
    assert statuses(tmp_path) == {"machine": "ok", "compiles": "earlier", "works": "ok"}
    with tarfile.open(out / "cache.tar.gz") as packed:
        assert packed.getnames() == ["jax/one"]


def test_a_process_that_goes_on_writing_temporary_files_is_no_failure(tmp_path, monkeypatch):
    remove, begun = os.rmdir, []

    def not_empty(path, **more):
        if Path(path).name.startswith("gpu-visit-"):
            begun.append(path)
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(path, **more)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "rmdir", not_empty)
    fake_visit(monkeypatch, part("works", number=1))
    assert gpu_visit.main([f"--out={tmp_path / 'out'}"]) == 0 and begun


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--parts=b17"], "--parts: 'b17' is none of ceilings, b16, "),
        (["--budget=-5"], "--budget: -5.0 is no number of seconds above 0"),
        (["--budget=0"], "--budget: 0.0 is no number"),
        (["--budget=nan"], "--budget: nan is no number"),
        (["--budget=inf"], "--budget: inf is no number"),
        (["--budget=10"], "--budget: too little for the first part, machine: it should take 20 s, and 10 s were left"),
        (["--cache=nowhere.tar.gz"], "--cache: nowhere.tar.gz cannot be unpacked: [Errno 2]"),
        (["--cache={tmp}/text"], "--cache: {tmp}/text cannot be unpacked: not a gzip file"),
        (["--cache={tmp}/half"], "--cache: {tmp}/half cannot be unpacked: Compressed file ended"),
        (["--earlier=nowhere.json"], "--earlier: nowhere.json cannot be read: [Errno 2]"),
        (["--earlier={tmp}/text"], "--earlier: {tmp}/text cannot be read: Expecting value"),
        (["--earlier={tmp}/empty"], "--earlier: {tmp}/empty is not the visit.json of a visit"),
        (["--earlier={tmp}/list"], "--earlier: {tmp}/list is not the visit.json of a visit"),
        (["--earlier={tmp}/parts"], "--earlier: {tmp}/parts is not the visit.json of a visit"),
        (["--out={tmp}/text"], "--out: {tmp}/text is no folder that can be written to: [Errno 17]"),
        (["--out=/proc/nope"], "--out: /proc/nope is no folder that can be written to: [Errno 2]"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_earlier_results_stay(tmp_path, capsys, words, error):
    (tmp_path / "text").write_text("text")
    (tmp_path / "empty").write_text("{}")
    (tmp_path / "list").write_text("[]")
    (tmp_path / "parts").write_text(json.dumps({"time": "today", "dry_run": False, "parts": {"b16": 1}}))
    (tmp_path / "noise").write_bytes(os.urandom(50_000))
    with tarfile.open(tmp_path / "whole", "w:gz") as archive:
        archive.add(tmp_path / "noise", "noise")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:20_000])
    out = tmp_path / "out"
    out.mkdir()
    (out / "visit.json").write_text("earlier")
    assert gpu_visit.main([f"--out={out}", *(word.format(tmp=tmp_path) for word in words)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith(f"error: {error.format(tmp=tmp_path)}")
    assert [one.name for one in out.iterdir()] == ["visit.json"] and (out / "visit.json").read_text() == "earlier"


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

"""The figures of compiled steps beside the committed ones: what is worse, what is written, and the exit code."""

import importlib.util
import json

import pytest
from compilers import run_python
from system import ROOT

# By its path, because tests/helpers has a module of the same name.
_SPEC = importlib.util.spec_from_file_location("bench_compiled", ROOT / "benchmarks" / "compiled.py")
compiled = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(compiled)

FIGURES = dict.fromkeys(compiled.FIGURES, 100.0)


def test_a_figure_is_worse_above_three_percent_and_is_named():
    now = {**FIGURES, "kernels": 103, "exposed MB": 103.1, "other GB": 50.0}
    assert compiled.worse(now, FIGURES) == ["exposed MB 103.1, committed 100.0"]


def test_anything_is_worse_than_nothing():
    nothing = {**FIGURES, "exposed": 0, "exposed ms": 0.0}
    assert compiled.worse(nothing, nothing) == []
    assert compiled.worse({**nothing, "exposed": 1}, nothing) == ["exposed 1, committed 0"]


def test_a_step_that_does_not_fit_any_more_is_worse_and_one_that_fits_at_last_is_not():
    too_large = {"temporaries GB": 90.0}
    assert compiled.worse(too_large, FIGURES) == ["does not fit any more"]
    assert compiled.worse(FIGURES, {"temporaries GB": 120.0}) == []
    assert compiled.row("v5e:4x4 L/16", too_large, {}) == "| v5e:4x4 L/16, does not fit | 90.0" + " | -" * 7 + " |"


def test_a_row_has_the_committed_figure_and_the_ratio():
    cells = compiled.row("h100:8 B/16", {**FIGURES, "step ms": 80.0}, {**FIGURES, "step ms": 100.0}).split(" | ")
    assert cells[-1] == "80.0 (100.0, 0.80) |" and cells[1] == "100.0 (100.0, 1.00)"


def test_figures_are_read_as_they_were_written_and_another_compilers_are_noticed(tmp_path, capsys, monkeypatch):
    path = tmp_path / "figures.json"
    compiled.write(path, {"h100:8 B/16": FIGURES})
    assert compiled.read(path) == {"h100:8 B/16": FIGURES} and capsys.readouterr().err == ""
    monkeypatch.setattr("jax.__version__", "0.0.1")
    assert compiled.read(path) == {"h100:8 B/16": FIGURES} and "this is 0.0.1" in capsys.readouterr().err
    assert compiled.read(tmp_path / "none.json") == {}


def test_a_case_that_fails_is_a_row_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    def measure(name, overrides):
        if name.startswith("b200"):
            raise RuntimeError("exit code -9, Killed")
        return FIGURES

    path = tmp_path / "figures.json"
    monkeypatch.setattr(compiled, "in_a_process", measure)
    monkeypatch.setattr("sys.argv", ["compiled.py", "--only=L/16", f"--figures={path}", "--update"])
    assert compiled.main() == 1
    out = capsys.readouterr()
    assert "| b200:8 L/16 | FAILED: exit code -9, Killed |" in out.out.splitlines()
    assert "b200:8 L/16 failed" in out.err
    assert list(compiled.read(path)) == ["v5e:4x4 L/16", "h100:8 L/16", "h100:8x2 L/16"]


def test_a_process_that_fails_is_an_error_with_its_last_line():
    with pytest.raises(RuntimeError, match=r"^exit code 1, .*model\.breadth"):
        compiled.in_a_process("h100:8 S/16", ["model.breadth=1"])


@pytest.mark.slow
def test_the_command_fails_where_a_committed_figure_is_better_by_more_than_three_percent(tmp_path):
    path = tmp_path / "figures.json"
    small = ["benchmarks/compiled.py", "--only=h100:8 S/16", f"--figures={path}", "model.depth=1"]
    run_python(*small, "--update")
    written = json.loads(path.read_text())
    figures = written["cases"]["h100:8 S/16"]
    assert figures.keys() == compiled.FIGURES.keys() and figures["kernels"] > 20 and figures["temporaries GB"] > 0.1
    kernels = figures["kernels"]
    figures |= {"kernels": int(kernels / 1.05), "products GB": figures["products GB"] / 1.02}
    path.write_text(json.dumps(written))
    ended = run_python(*small, code=1)
    assert ended.stderr.splitlines()[-1] == f"worse: h100:8 S/16: kernels {kernels}, committed {int(kernels / 1.05)}"
    assert ended.stdout.count("worse") == 0 and ended.stdout.splitlines()[-1].startswith("| h100:8 S/16 |")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["h100:8 B/16", "v5e:4x4 L/16"])
def test_a_step_is_no_worse_than_when_its_figures_were_committed(case):
    assert compiled.read(compiled.COMMITTED)[case].keys() == compiled.FIGURES.keys()
    run_python("benchmarks/compiled.py", f"--only={case}")

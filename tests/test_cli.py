"""The command: what it prints where, and the code it exits with."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest

import vit_dist
import vit_dist.train  # noqa: F401
from vit_dist import cli, config
from vit_dist.job import processes

REPOSITORY = Path(__file__).parents[1]
SMALLEST = str(Path(__file__).parent / "helpers" / "smallest.py")
TRAIN_MODULE = sys.modules["vit_dist.train"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A finished run, not to be changed, and what the command printed."""
    workdir, out = tmp_path_factory.mktemp("cli") / "run", io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["train", f"--config={SMALLEST}", f"--workdir={workdir}"]) == 0
    return workdir, out.getvalue()


@pytest.fixture(scope="module")
def trained(finished) -> Path:
    return finished[0]


@pytest.fixture
def said(capsys):
    """Runs a command that must succeed; its stdout."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert cli.main(list(words)) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def image(tmp_path) -> str:
    cv2.imwrite(str(tmp_path / "one.png"), np.eye(8, dtype=np.uint8) * 255)
    return str(tmp_path / "one.png")


def test_train_prints_its_summary_alone_and_prints_it_again_when_asked_again(said, finished, caplog):
    workdir, first = finished
    assert first.count("\n") == 1
    summary = json.loads(first)
    assert list(summary) == ["step", "count", "loss", "top1", "seconds", "workdir"]
    assert summary["step"] == 2 and summary["count"] == 360 and summary["workdir"] == str(workdir)
    assert said("train", f"--config={SMALLEST}", f"--workdir={workdir}", "--config.log_every=7") == first
    assert "resuming with another log_every (was 1, now 7)" in caplog.text


def test_eval_prints_one_object_with_the_keys_that_scripts_rely_on(said, trained):
    out = said("eval", f"--workdir={trained}")
    found = json.loads(out)
    assert out.count("\n") == 1
    assert list(found)[:6] == ["split", "step", "count", "loss", "top1", "top5"]
    assert (found["split"], found["step"], found["count"]) == ("test", 2, 360)
    assert 0 <= found["top1"] <= found["top5"] <= 1
    assert list(found["class_top1"]) == list("0123456789")
    assert found["loss"] == json.loads((trained / "summary.json").read_text())["loss"]


def test_eval_takes_a_split_a_step_and_another_mesh_without_a_word_of_resuming(said, trained, caplog):
    words = ("--split=train", "--step=2", "--config.mesh.data=-1", "--config.evaluate.batch_size", "100")
    found = json.loads(said("eval", f"--workdir={trained}", *words))
    assert (found["split"], found["count"]) == ("train", 1437)
    assert "resuming" not in caplog.text


def test_predict_prints_a_table_or_an_object_a_line(said, trained, image):
    lines = said("predict", f"--workdir={trained}", "--top=2", image, image).splitlines()
    assert lines[0].split() == ["image", "class", "probability"] and len(lines) == 5
    assert lines[1].startswith(image) and lines[2].startswith(" ") and lines[3].startswith(image)
    assert lines[1].endswith("%") and lines[1].index("%") == lines[2].index("%")
    every = said("predict", f"--workdir={trained}", "--top=99", image).splitlines()
    assert len(every) == 11 and sum(line.startswith(image) for line in every) == 1
    objects = [
        json.loads(line) for line in said("predict", f"--workdir={trained}", "--json", image, image).splitlines()
    ]
    assert len(objects) == 2 and list(objects[0]) == ["file", "classes"] and len(objects[0]["classes"]) == 5
    assert objects[0]["classes"][0]["name"] == lines[1].split()[1]


def test_inspect_prints_a_table_or_one_object(said):
    found = json.loads(said("inspect", f"--config={SMALLEST}", "--json"))
    assert {"parameters", "flops_per_image", "bytes_per_device"} <= set(found)
    assert {"parameters", "optimizer"} <= set(found["bytes_per_device"])
    assert found["bytes_per_device"]["parameters"] == 4 * found["parameters"]
    table = said("inspect", f"--config={SMALLEST}")
    assert table.splitlines()[0].split() == ["parameter", "shape", "dtype", "sharding", "bytes", "per", "device"]
    assert len(table.splitlines()) > len(found["tensors"])
    sums = dict(line.rsplit("  ", 1) for line in table.splitlines()[-5:])
    sums = {name.strip(): value.strip() for name, value in sums.items()}
    assert sums["parameters"] == f"{found['parameters']:,}"
    assert sums["bytes per device, optimizer"] == f"{found['bytes_per_device']['optimizer']:,}"


def test_configs_lists_the_recipes_with_what_they_are(said, tmp_path):
    rows = json.loads(said("configs", str(REPOSITORY / "configs"), "--json"))
    names = [Path(row["config"]).stem for row in rows]
    assert names == sorted(names) and {"digits", "d2l_fashion_mnist", "cifar10"} <= set(names)
    assert all(set(row) == {"name", "config", "summary"} and row["summary"] for row in rows)
    lines = said("configs", str(REPOSITORY / "configs")).splitlines()
    assert lines[0].split() == ["name", "config", "summary"] and len(lines) == 1 + len(rows)
    assert [Path(row["config"]).resolve() for row in json.loads(said("configs", "--json"))] == [
        Path(row["config"]).resolve() for row in rows
    ]
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "fine.py").write_text('"""One line.\n\nMore."""\n')
    broken, fine = json.loads(said("configs", str(tmp_path), "--json"))
    assert broken["summary"].startswith("(cannot be read: invalid syntax") and fine["summary"] == "One line."


def test_version_says_what_is_installed_on_what_devices_and_the_commit(said):
    lines = said("--version").splitlines()
    assert lines[0] == f"vit-dist {vit_dist.__version__}" and f"jax {jax.__version__}" in lines
    assert "8 x cpu" in lines and any(line.startswith(("commit ", "no checkout")) for line in lines)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TRAIN_MODULE.Preempted("saved step 3 of 9 in D"), 75, "preempted: saved step 3 of 9 in D\n"),
        (TRAIN_MODULE.Diverged("the loss is nan at step 3"), 1, "error: the loss is nan at step 3\n"),
        (config.ConfigError("seed: no"), 2, "error: seed: no\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (PermissionError(13, "Permission denied", "/somewhere/x"), 2, "error: /somewhere/x: Permission denied\n"),
    ],
)
def test_each_way_to_stop_has_its_exit_code_and_one_line(monkeypatch, capsys, error, code, line):
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(TRAIN_MODULE, "train", stop)
    assert cli.main(["train", f"--config={SMALLEST}", "--workdir=unused"]) == code
    assert capsys.readouterr() == ("", line)


def test_an_error_of_our_own_is_not_hidden(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "something of ours")

    monkeypatch.setattr(TRAIN_MODULE, "train", fail)
    with pytest.raises(FileNotFoundError):
        cli.main(["train", f"--config={SMALLEST}", "--workdir=unused"])


def test_only_the_first_process_of_a_job_prints_results(monkeypatch, capsys):
    monkeypatch.setattr(processes, "index", lambda: 1)
    assert cli.main(["configs", str(REPOSITORY / "configs")]) == 0
    assert cli.main(["configs", str(REPOSITORY / "configs"), "--json"]) == 0
    assert capsys.readouterr().out == ""


def test_results_go_to_stdout_and_all_else_to_stderr(tmp_path):
    command = [sys.executable, "-m", "vit_dist", "train", f"--config={SMALLEST}", f"--workdir={tmp_path}/run"]
    done = subprocess.run(
        [*command, "--config.fake_devices=1"], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    assert json.loads(done.stdout)["step"] == 2 and done.stdout.count("\n") == 1
    assert "step 2/2" in done.stderr and "test at step 2: top1" in done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr


def test_help_is_quick_and_needs_no_jax():
    code = (
        "import sys\nfrom vit_dist.cli import main\n"
        "for words in (['--help'], ['train', '--help']):\n"
        "    try:\n        main(words)\n    except SystemExit as stopped:\n        assert stopped.code == 0\n"
        "print([name for name in ('jax', 'flax', 'grain', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for verb in ("train", "eval", "predict", "features", "inspect", "bench", "prepare", "configs"):
        assert f"    {verb} " in done.stdout


def test_the_module_and_the_console_script_are_one_command():
    script = Path(sys.executable).with_name("vit-dist")
    if not script.exists():
        pytest.skip("the package is not installed here")
    for words in (["--help"], ["configs", "nowhere"]):
        as_module, as_script = (
            subprocess.run([*start, *words], capture_output=True, text=True, cwd=REPOSITORY, env=dict(os.environ))
            for start in ([sys.executable, "-m", "vit_dist"], [str(script)])
        )
        assert (as_module.returncode, as_module.stdout, as_module.stderr) == (
            as_script.returncode,
            as_script.stdout,
            as_script.stderr,
        )

"""What a visit takes along, and the calls that README.md gives for it: a next session copies them blindly."""

import re
import shlex
import subprocess

import gpu_visit
import pytest
import visit_kit
from visit import parts

README = (visit_kit.ROOT / "benchmarks" / "README.md").read_text()
MAKEFILE = (visit_kit.ROOT / "Makefile").read_text()
CALLS = [line.strip() for line in README.splitlines() if line.startswith("    python3 -m pip install")]


def test_wheels_are_of_the_versions_that_the_machines_python_gets():
    pins = visit_kit.pinned((visit_kit.ROOT / "constraints.txt").read_text())
    assert [pins[name] for name in ("flax", "optax", "orbax-checkpoint")] == ["0.12.12", "0.2.8", "0.12.8"]
    assert [name for name in visit_kit.WHEELS if name not in pins] == []
    assert {"jax", "jaxlib", "numpy", "scipy", "ml-dtypes", "opencv-python-headless"}.isdisjoint(visit_kit.WHEELS)


def test_all_that_travels_is_counted_and_what_git_ignores_is_not(tmp_path):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x", *words], check=True)

    git("init", "--quiet")
    for name, size in ((".gitignore", None), ("tracked", 100), ("new", 20), ("ignored", 5000), (".kit/a/wheel", 3)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"ignored\n.kit\n" if size is None else bytes(size))
    git("add", ".gitignore", "tracked")
    git("commit", "--quiet", "-m", "one")
    assert visit_kit.travelling(tmp_path, tmp_path / ".kit") == 13 + 100 + 20 + 3


def test_too_much_to_travel_is_refused(capsys):
    visit_kit.check_size(64 * 2**20)
    with pytest.raises(SystemExit, match="too much to travel"):
        visit_kit.check_size(64 * 2**20 + 1)
    assert "64.0 of 64 MiB" in capsys.readouterr().err


@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_short_enough_and_asks_for_what_there_is(call):
    install, _, visit = call.partition(" && ")
    assert len(call) <= 2000
    words = shlex.split(visit)
    assert words[:3] == ["PYTHONPATH=/tmp/site:.", "python3", "benchmarks/gpu_visit.py"]
    options = gpu_visit.parser().parse_args(words[3:])
    assert str(options.out) == "$OUT" and options.kit.name == ".visit" and not options.dry_run
    assert set((options.parts or "b16").split(",")) <= parts.BY_NAME.keys()
    # the proof puts the wheels in place by the same words
    made = re.sub(r"\s*\\\n\s*", " ", MAKEFILE).replace("$(MACHINE)/bin/python", "python3")
    made = made.replace("$(MACHINE)/site", "/tmp/site").replace("$(KIT)/wheels", ".visit/wheels")
    assert install in made


def test_there_is_a_call_for_each_of_the_three_visits():
    assert [len(re.findall(f"--budget={seconds}", README)) for seconds in (420, 180, 120)] == [1, 1, 1]
    assert len(CALLS) == 3 and '`carry` = `[".visit"]`' in README


def test_the_readme_names_every_part():
    assert [name for name in parts.BY_NAME if f"`{name}`" not in README] == []

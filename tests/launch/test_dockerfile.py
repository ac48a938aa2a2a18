"""The Dockerfile, read as Docker reads it, and its target `cpu` carried out step by step in an empty environment.

There is no Docker here. What stands in for it: a folder for the image's disk, a fresh virtual environment for its
Python, and two programs that note what they are asked for in place of `useradd` and `install`, which would change this
machine.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from system import ROOT

TARGETS = ("gpu", "tpu", "cpu")


def _stages():
    """Name -> (the stage it is made from, its instructions as (keyword, rest)), in the order of the file."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    stages = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, rest = line.split(None, 1)
        if keyword == "FROM":
            source, _, name = rest.split()
            stages[name] = (source, [])
        else:
            list(stages.values())[-1][1].append((keyword, rest))
    return stages


def _instructions(target):
    """All that make a target, those of the stages that it is made from first."""
    stages = _stages()
    if target not in stages:
        return []
    source, own = stages[target]
    return [*_instructions(source), *own]


def _values(target, keyword):
    return [rest for name, rest in _instructions(target) if name == keyword]


def test_the_targets_are_gpu_tpu_and_by_default_cpu():
    stages = _stages()
    assert set(TARGETS) < set(stages) and list(stages)[-1] == "cpu"
    extras = [re.search(r'"\.\[(\w+)\]"', _values(one, "RUN")[-1])[1] for one in TARGETS]
    assert extras == list(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_slim_pinned_and_not_root_and_its_libraries_come_before_the_code(target):
    steps = _instructions(target)
    assert _stages()["base"][0].endswith("-slim")
    assert steps[-1] == ("USER", "vit")
    installs = [place for place, (keyword, rest) in enumerate(steps) if keyword == "RUN" and "pip install" in rest]
    assert len(installs) == 1 and "--constraint constraints.txt" in steps[installs[0]][1]
    before = [rest for keyword, rest in steps[: installs[0]] if keyword == "COPY"]
    assert before == ["pyproject.toml setup.py constraints.txt ./"]
    assert ("COPY", "--from=code / ./") in steps[installs[0] :]


@pytest.mark.slow
def test_what_the_target_cpu_says_makes_an_environment_whose_default_command_trains_the_digits(tmp_path):
    disk, work = tmp_path / "disk", tmp_path / "disk" / "opt" / "vit_dist"
    stand_ins, venv = tmp_path / "bin", tmp_path / "venv"
    work.mkdir(parents=True)
    stand_ins.mkdir()
    for name in ("useradd", "install"):
        (stand_ins / name).write_text(f'#!/bin/sh\necho {name} "$@" >>"{tmp_path}/asked"\n')
        (stand_ins / name).chmod(0o755)
    # venv's own pip, as an image of Python has it; without --system-site-packages it sees nothing else
    subprocess.run([_python_of_the_image(), "-m", "venv", venv], check=True)
    environment = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "SSL_", "HOME"))}
    environment["PATH"] = f"{venv}/bin:{stand_ins}:/usr/bin:/bin"
    place = Path("/")
    for keyword, rest in _instructions("cpu"):
        if keyword == "ENV":
            environment |= dict(word.split("=", 1) for word in shlex.split(rest))
        elif keyword == "WORKDIR":
            place = Path(rest)
            assert disk / place.relative_to("/") == work
        elif keyword == "COPY":
            _copy(rest, work)
        elif keyword == "RUN":
            where = disk / place.relative_to("/")
            subprocess.run(["sh", "-c", rest], cwd=where, env=environment, check=True, timeout=900)
        else:
            assert keyword in ("VOLUME", "ENTRYPOINT", "CMD", "USER")
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["useradd --create-home --uid 1000 vit", "install --directory --owner=vit /runs"]

    words = [word for keyword in ("ENTRYPOINT", "CMD") for word in json.loads(_values("cpu", keyword)[0])]
    assert words[1] == "train" and words[-1].startswith("--workdir=/runs/")
    words[-1] = words[-1].replace("/runs", str(tmp_path / "runs"))
    ended = subprocess.run(
        [*words, "--config.total_steps=20"], cwd=work, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["step"] == 20 and result["count"] == 360


def _python_of_the_image():
    """An interpreter of the version that the image has, where there is one here; else this one."""
    version = re.match(r"python:([\d.]+)-", _stages()["base"][0])[1]
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python3"))
    for candidate in (shutil.which(f"python{version}"), *pyenv):
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return str(candidate)
    return sys.executable


def _copy(rest, work):
    """One COPY, of what git knows: what else lies in a checkout must not be needed."""
    if rest.startswith("--from="):
        assert rest == "--from=code / ./"
        for keyword, inner in _stages()["code"][1]:
            assert keyword == "COPY"
            _copy(inner, work)
        return
    *sources, target = rest.split()
    for source in sources:
        known = subprocess.run(
            ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", source],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        assert known, f"COPY {source}: there is no such thing"
        for name in known:
            inside = Path(name).relative_to(source) if (ROOT / source).is_dir() else Path(name)
            path = work / target.removeprefix("/").removeprefix("./") / inside
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, path)

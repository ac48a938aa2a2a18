"""The scripts of `launch/`: sound shell, and the very commands that they promise, with programs that note them."""

import os
import re
import shutil
import subprocess

import pytest
from system import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(one for one in LAUNCH.iterdir() if one.suffix in (".sh", ".sbatch"))
OVERRIDES = ("--config.seed=1", "--config.data.path=a b")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_is_sound_and_says_how_it_is_used(script, tmp_path):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ") and "\nset -euo pipefail\n" in text
    assert f"launch/{script.name} " in text[: text.index("set -euo")]  # the exact command, in the comment at its head
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    ended = subprocess.run(["bash", script], capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2 and "usage: " in ended.stderr and "CONFIG WORKDIR" in ended.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_passes_shellcheck(script):
    if shutil.which("shellcheck") is None:
        pytest.skip("NO SCRIPT WAS CHECKED: shellcheck not found: apt-get install shellcheck")
    ended = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


@pytest.fixture
def noted(tmp_path):
    """Runs a script of a copy of `launch/`, which has no .venv beside it, and returns what its programs were asked."""
    shutil.copytree(LAUNCH, tmp_path / "checkout" / "launch")
    (tmp_path / "bin").mkdir()
    for name in ("vit-dist", "mpirun", "srun", "scontrol"):
        stand_in = tmp_path / "bin" / name
        stand_in.write_text(
            f'#!/usr/bin/env bash\nprintf "%s\\n" {name} "$@" "" >>"{tmp_path}/noted"\n'
            f'[ {name} != srun ] || exit "${{SRUN_CODE:-0}}"\n'
        )
        stand_in.chmod(0o755)

    def run(script, *arguments, **variables):
        environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", **variables}
        command = [tmp_path / "checkout" / "launch" / script, *arguments]
        (tmp_path / "noted").write_text("")
        ended = subprocess.run(command, env=environment, cwd=tmp_path / "checkout", capture_output=True, text=True)
        calls = (tmp_path / "noted").read_text().removesuffix("\n\n").split("\n\n")
        return ended.returncode, [call.split("\n") for call in calls]

    return run


def test_fake_mesh_trains_on_eight_fake_devices_or_as_many_as_it_is_told(noted):
    expected = ["vit-dist", "train", "--config=C", "--workdir=W", "--config.fake_devices=8", *OVERRIDES]
    assert noted("fake_mesh.sh", "C", "W", *OVERRIDES) == (0, [expected])
    assert noted("fake_mesh.sh", "C", "W", FAKE_DEVICES="4")[1][0][4] == "--config.fake_devices=4"


def test_local_launches_a_process_a_gpu_and_starts_them_again_after_a_crash(noted):
    train = ["train", "--config=C", "--workdir=W", *OVERRIDES]
    expected = ["vit-dist", "launch", "--restarts=3", "--", *train]
    assert noted("local.sh", "C", "W", *OVERRIDES) == (0, [expected])
    expected = ["vit-dist", "launch", "--processes=4", "--restarts=0", "--", *train]
    assert noted("local.sh", "C", "W", *OVERRIDES, PROCESSES="4", RESTARTS="0") == (0, [expected])


def test_mpi_passes_on_what_steers_the_libraries_and_nothing_else(noted):
    variables = {"HOSTS": "a:8,b:8", "NCCL_DEBUG": "INFO", "SECRET": "x"}
    code, [call] = noted("mpi.sh", "C", "W", *OVERRIDES, **variables)
    assert code == 0 and call[:3] == ["mpirun", "--host", "a:8,b:8"]
    assert call[-6:] == ["vit-dist", "train", "--config=C", "--workdir=W", *OVERRIDES]
    passed = {call[place + 1] for place, word in enumerate(call) if word == "-x"}
    assert passed == {"PATH", "NCCL_DEBUG", "VIT_DIST_COORDINATOR", "VIT_DIST_JOB_SECRET"}


@pytest.mark.parametrize(("port", "expected"), [({}, r"a:2\d{4}"), ({"PORT": "1234"}, "a:1234")])
def test_mpi_tells_each_rank_its_place_whatever_the_version_of_open_mpi(noted, tmp_path, port, expected):
    ranks = {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    (tmp_path / "bin" / "mpirun").write_text('#!/usr/bin/env bash\nwhile [ "$1" != bash ]; do shift; done; exec "$@"\n')
    (tmp_path / "bin" / "vit-dist").write_text(f'#!/usr/bin/env bash\nenv >>"{tmp_path}/noted"\n')
    _, [lines] = noted("mpi.sh", "C", "W", HOSTS="a:8,b:8", **ranks, **port)
    found = dict(line.split("=", 1) for line in lines if line.startswith("VIT_DIST_"))
    assert re.fullmatch(expected, found.pop("VIT_DIST_COORDINATOR"))
    assert re.fullmatch("[0-9a-f]{64}", found.pop("VIT_DIST_JOB_SECRET"))
    assert found == {"VIT_DIST_PROCESSES": "16", "VIT_DIST_PROCESS": "9", "VIT_DIST_LOCAL_PROCESS": "1"}


def test_slurm_trains_in_a_container_where_one_is_named(noted, tmp_path):
    job = {"SLURM_SUBMIT_DIR": str(tmp_path / "checkout"), "SLURM_JOB_ID": "7"}
    train = ["vit-dist", "train", "--config=C", "--workdir=W", *OVERRIDES]
    code, [call] = noted("slurm.sbatch", "C", "W", *OVERRIDES, **job)
    srun = ["srun", "--wait=60", "--kill-on-bad-exit=0", "--cpu-bind=none"]
    assert code == 0 and call == [*srun, *train]
    checkout, work = tmp_path / "checkout", tmp_path / "runs" / "new"
    train[3] = f"--workdir={work}"
    for variables, mounts in (
        ({}, f"{checkout}:{checkout},{work}:{work}"),
        ({"CONTAINER_MOUNTS": "/a:/b"}, "/a:/b"),
    ):
        code, [call] = noted("slurm.sbatch", "C", str(work), *OVERRIDES, CONTAINER="x.sqsh", **variables, **job)
        mounted = [f"--container-mounts={mounts}", f"--container-workdir={checkout}"]
        assert code == 0 and call == [*srun, "--container-image=x.sqsh", *mounted, *train]
        assert work.is_dir() == (not variables)
        shutil.rmtree(work, ignore_errors=True)


@pytest.mark.parametrize(
    ("code", "allowed", "done", "again"),
    [
        ("0", "3", "0", False),
        ("2", "3", "0", False),  # a mistake stays one
        ("75", "0", "9", True),  # preempted, however often
        ("137", "0", "0", False),
        ("137", "3", "2", True),  # a crash, as often as is allowed
        ("137", "3", "3", False),
    ],
)
def test_slurm_queues_a_job_again_after_a_preemption_and_after_as_many_crashes_as_allowed(
    noted, tmp_path, code, allowed, done, again
):
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": done}
    ended, calls = noted("slurm.sbatch", "C", "W", SRUN_CODE=code, RESTARTS=allowed, **job)
    assert ended == int(code)
    assert calls[1:] == ([["scontrol", "requeue", "7"]] if again else [])

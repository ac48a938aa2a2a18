"""`tpu_pod.sh` run whole, against a stand-in for Google's `gcloud` that notes its calls and has two workers.

What the script sends to a worker is really carried out, in a folder that stands for the worker's home, with stand-ins
for what a worker has: `python3 -m pip` that brings a `uv`, a `uv` that brings a `vit-dist`, and the metadata server.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from system import ROOT

WORKERS = 2
OPTIONS = ("--zone=z", "--type=v5litepod-16", "--name=pod")
RUN = ("configs/digits.py", "/mnt/run", "--config.seed=1", "--config.data.path=a b")

# Reads what is to happen from files in CLOUD: `codes` holds what `vit-dist` ends with, a word for each try; `fail-VERB`
# how often that fails; `drop` has the connection lost while all workers train, or once they are done.
_GCLOUD = """#!{python} -IS
import json, os, pathlib, shutil, subprocess, sys, time
cloud = pathlib.Path(os.environ["CLOUD"])
words = sys.argv[1:]
with open(cloud / "calls", "a") as calls:
    calls.write(json.dumps(["gcloud", *words]) + "\\n")
options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
kind, verb, name = words[2:5]
there = cloud / "there"
if (cloud / f"fail-{{verb}}").exists():
    limit = (cloud / f"fail-{{verb}}").read_text()  # how often; empty: always
    if limit != "0":
        (cloud / f"fail-{{verb}}").write_text(str(int(limit) - 1) if limit else "")
        sys.exit("ERROR: UNAUTHENTICATED" if verb == "describe" else 1)
if verb == "create":
    there.write_text("WAITING_FOR_RESOURCES" if kind == "queued-resources" else "READY")
elif verb == "delete":
    if not there.exists():
        sys.exit("ERROR: NOT_FOUND")
    there.unlink()
    for home in cloud.glob("worker*"):
        shutil.rmtree(home)
elif verb == "describe":
    if not there.exists():
        sys.exit("ERROR: NOT_FOUND")
    state = there.read_text()
    if state == "WAITING_FOR_RESOURCES":
        there.write_text("ACTIVE")
    print("READY" if state == "ACTIVE" and kind == "tpu-vm" else state)
else:
    if not there.exists():
        sys.exit("ERROR: NOT_FOUND")
    worst = 0
    chosen = range({workers}) if options["worker"] == "all" else [int(options["worker"])]
    for worker in chosen:
        home = cloud / f"worker{{worker}}"
        home.mkdir(exist_ok=True)
        if verb == "scp":
            shutil.copy(name, home / words[5].split(":")[1])
            continue
        environment = {{**os.environ, "HOME": str(home), "WORKER": str(worker)}}
        if (cloud / "drop").exists() and "vit-dist train" in options["command"]:
            left = subprocess.Popen(["bash", "-c", options["command"]], cwd=home, env=environment)
            if (cloud / "codes").read_text() == "0":
                left.wait()
            while len((cloud / "trained").read_text().splitlines()) <= worker:
                time.sleep(0.02)
            continue
        ended = subprocess.run(["bash", "-c", options["command"]], cwd=home, env=environment)
        worst = max(worst, ended.returncode)
    if (cloud / "drop").exists() and verb == "ssh" and "vit-dist train" in options["command"]:
        (cloud / "drop").unlink()
        sys.exit("Connection closed")
    sys.exit(worst and 1)
"""
_CURL = """#!/bin/sh
echo "$WORKER"
"""
_PYTHON = """#!/bin/sh
[ "$*" = "-m pip install --quiet --user uv" ] || exit 9
mkdir -p ~/.local/bin && cp "$CLOUD/uv" ~/.local/bin/uv
"""
_UV = """#!/bin/sh
case "$1 $2" in
  "venv --quiet") mkdir -p .venv/bin ;;
  "pip install") [ -f pyproject.toml ] && [ -f constraints.txt ] && cp "$CLOUD/vit-dist" .venv/bin ;;
esac
"""
_VIT_DIST = """#!{python} -IS
import json, os, pathlib, sys, time
cloud, worker = pathlib.Path(os.environ["CLOUD"]), int(os.environ["WORKER"])
codes = (cloud / "codes").read_text().split()
if worker == {last}:
    (cloud / "codes").write_text(" ".join(codes[1:]))
with open(cloud / "trained", "a") as trained:
    trained.write(json.dumps([worker, sys.argv[1:], pathlib.Path(sys.argv[2].split("=")[1]).is_file()]) + "\\n")
with open(cloud / "pids", "a") as pids:
    pids.write(f"{{os.getpid()}}\\n")
print(f"worker {{worker}} speaks", flush=True)
if codes[0] == "gone":
    (cloud / "there").write_text("PREEMPTED")
    sys.exit(1)
while codes[0] == "endless":
    time.sleep(0.1)
    if not (cloud / "there").exists():  # the machine is gone, and all that it ran
        sys.exit(1)
sys.exit(int(codes[0]))
"""


class Cloud:
    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir()
        values = {"python": sys.executable, "workers": WORKERS, "last": WORKERS - 1}
        programs = {"bin/gcloud": _GCLOUD, "bin/curl": _CURL, "bin/python3": _PYTHON, "uv": _UV, "vit-dist": _VIT_DIST}
        for name, text in programs.items():
            (folder / name).write_text(text.format(**values) if text.startswith("#!{") else text)
            (folder / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "CLOUD": str(folder),
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "TMPDIR": str(folder),
            "POLL_SECONDS": "0.01",
            "RETRY_SECONDS": "0.01",
        }

    def start(self, *arguments, codes="0"):
        """The script under way; its stdout and stderr are pipes."""
        for name in ("calls", "trained"):
            (self.folder / name).write_text("")
        (self.folder / "codes").write_text(codes)
        command = [ROOT / "launch" / "tpu_pod.sh", *arguments]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder
        )

    def run(self, *arguments, codes="0"):
        """(exit code, stdout, stderr) of the script."""
        process = self.start(*arguments, codes=codes)
        out, err = process.communicate(timeout=100)
        return process.returncode, out, err

    def calls(self):
        """The arguments of every call of gcloud, in order."""
        return self._lines("calls")

    def verbs(self):
        return [call[4] for call in self.calls()]

    def trained(self):
        """[worker, the arguments of its vit-dist, whether its config was there] for each start of it."""
        return self._lines("trained")

    def wait_for_training(self, process):
        deadline = time.monotonic() + 60
        while not self.trained():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)

    def exists(self):
        """Whether there is a slice, which costs money."""
        return (self.folder / "there").exists()

    def _lines(self, name):
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def test_a_slice_is_created_set_up_run_on_all_workers_and_deleted(cloud):
    code, out, err = cloud.run(*OPTIONS, *RUN)
    assert code == 0, err
    assert cloud.verbs() == ["describe", "create", "scp", "ssh", "ssh", "delete"]
    assert all("--zone=z" in call and call[:3] == ["gcloud", "compute", "tpus"] for call in cloud.calls())
    assert cloud.calls()[1][3:8] == ["tpu-vm", "create", "pod", "--accelerator-type=v5litepod-16", _version("v5-lite")]
    assert all("--worker=all" in call for call in cloud.calls()[2:5])
    arguments = ["train", f"--config={RUN[0]}", f"--workdir={RUN[1]}", *RUN[2:]]
    assert cloud.trained() == [[worker, arguments, True] for worker in range(WORKERS)]
    assert out == "worker 0 speaks\n"  # the others speak into a file
    assert not cloud.exists() and not list(cloud.folder.glob("*.tar.gz"))


@pytest.mark.parametrize("queued", [False, True])
def test_workers_in_a_private_network_are_made_and_reached_there(cloud, queued):
    placed = ["--reserved", "--network=lab", "--internal-ips", "--service-account=trainer@p.example"]
    code, _, err = cloud.run(*OPTIONS, *placed, *(["--queued"] if queued else []), *RUN)
    assert code == 0, err
    by_verb = {call[4]: call for call in cloud.calls()}
    assert set(placed) <= set(by_verb["create"])
    for verb, call in by_verb.items():
        assert ("--internal-ip" in call) == (verb in ("ssh", "scp"))
        assert verb == "create" or not set(placed) & set(call)


def _version(end):
    return f"--version=v2-alpha-tpu{end}"


def test_a_dry_run_calls_nothing_and_prints_the_very_commands_that_a_run_makes(cloud):
    for extra in ((), ("--queued", "--spot", "--project=p", "--before=echo 'x y' >before")):
        code, printed, _ = cloud.run(*OPTIONS, *extra, "--dry-run", *RUN)
        assert code == 0 and cloud.calls() == [] and cloud.trained() == []
        planned = _commands(printed)
        code, _, err = cloud.run(*OPTIONS, *extra, *RUN)
        assert code == 0, err
        made, again = cloud.calls(), ["gcloud", "compute", "tpus", "queued-resources", "describe"]
        asked = [place for place, call in enumerate(made) if call[:5] == again][2:]  # while it waits in the queue
        made = [call for place, call in enumerate(made) if place not in asked]
        assert [call for call in planned if call[0] == "gcloud"] == made
        assert [call[0] for call in planned if call[0] != "gcloud"] == ["tar"]


def _commands(printed):
    """What bash makes of the printed lines, each a command."""
    script = "set -f\n" + "".join(
        f"for word in {line}; do printf '%s\\0' \"$word\"; done; printf '\\n\\0'\n" for line in printed.splitlines()
    )
    words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    return [call.removesuffix("\0").split("\0") for call in words.removesuffix("\n\0").split("\n\0")]


def test_a_queued_slice_is_waited_for_and_deleted_with_its_request(cloud):
    code, _, err = cloud.run(*OPTIONS, "--queued", "--spot", *RUN)
    assert code == 0, err
    kinds = [tuple(call[3:5]) for call in cloud.calls()]
    assert kinds[:4] == [("queued-resources", verb) for verb in ("describe", "create", "describe", "describe")]
    assert kinds[-1] == ("queued-resources", "delete") and "--force" in cloud.calls()[-1]
    assert {"--node-id=pod", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} < set(cloud.calls()[1])
    assert not cloud.exists()


@pytest.mark.parametrize("verb", ["create", "scp", "ssh"])
def test_a_slice_is_deleted_when_a_command_of_gclouds_fails(cloud, verb):
    (cloud.folder / f"fail-{verb}").touch()
    if verb == "create":
        (cloud.folder / "there").unlink(missing_ok=True)
    code, _, _ = cloud.run(*OPTIONS, *RUN)
    assert code != 0 and cloud.verbs()[-1] == "delete" and cloud.verbs().count("create") == 1
    assert cloud.trained() == [] and not cloud.exists()


@pytest.mark.parametrize("code", ["1", "2"])
def test_a_run_that_fails_is_not_tried_again_and_the_words_of_all_workers_are_shown(cloud, code):
    ended, _, err = cloud.run(*OPTIONS, *RUN, codes=code)
    assert ended == int(code) and f"error: worker 0 ended with {code}" in err
    assert "worker 1 speaks" in err
    assert cloud.verbs().count("create") == 1 and not cloud.exists()


def _made_and_deleted(cloud):
    return [verb for verb in cloud.verbs() if verb in ("create", "delete")]


def test_a_slice_that_is_taken_back_is_made_anew_and_the_run_goes_on(cloud):
    code, _, err = cloud.run(*OPTIONS, *RUN, codes="gone 0")
    assert code == 0, err
    assert _made_and_deleted(cloud) == ["create", "delete"] * 2
    assert [worker for worker, _, _ in cloud.trained()] == [0, 1, 0, 1]
    assert "retry 1 of 3" in err and not cloud.exists()


@pytest.mark.parametrize("keep", [(), ("--keep",)])
def test_a_run_that_has_saved_goes_on_on_the_same_slice_where_that_is_still_there(cloud, keep):
    code, _, err = cloud.run(*OPTIONS, *keep, *RUN, codes="75 0")
    assert code == 0, err
    assert _made_and_deleted(cloud) == ["create", "delete"][: 1 if keep else 2]
    assert [worker for worker, _, _ in cloud.trained()] == [0, 1, 0, 1]
    assert "the slice is READY, worker 0's exit code 75: retry 1 of 3" in err and cloud.exists() == bool(keep)


def test_after_a_lost_connection_what_is_left_is_ended_and_the_run_goes_on_on_the_same_slice(cloud):
    (cloud.folder / "drop").touch()
    code, _, err = cloud.run(*OPTIONS, *RUN, codes="endless 0")
    assert code == 0, err
    assert _made_and_deleted(cloud) == ["create", "delete"]
    assert [worker for worker, _, _ in cloud.trained()] == [0, 1, 0, 1]
    assert "worker 0's exit code unknown: retry 1 of 3" in err
    assert not any(os.path.exists(f"/proc/{pid}") for pid in (cloud.folder / "pids").read_text().split())


def test_a_run_that_is_done_is_done_though_a_connection_was_lost(cloud):
    (cloud.folder / "drop").touch()
    code, _, err = cloud.run(*OPTIONS, *RUN, codes="0")
    assert code == 0 and "retry" not in err
    assert [worker for worker, _, _ in cloud.trained()] == [0, 1] and not cloud.exists()


def test_a_new_slice_that_is_not_to_be_had_at_once_is_asked_for_again(cloud):
    process = cloud.start(*OPTIONS, *RUN, codes="endless 0")
    cloud.wait_for_training(process)
    (cloud.folder / "fail-create").write_text("2")
    (cloud.folder / "there").unlink()  # taken back
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert _made_and_deleted(cloud) == ["create", "delete", *["create", "delete"] * 2, "create", "delete"]
    assert "no new slice was to be had: retry 3 of 3" in err and "costs money" not in err


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_google_says_is_not_taken_for_a_deleted_slice_but_where_it_says_so(cloud, when):
    failing = cloud.folder / "fail-describe"
    if when == "before":
        failing.touch()
    process = cloud.start(*OPTIONS, *RUN, codes="endless")
    if when == "after":
        cloud.wait_for_training(process)
        failing.touch()
        (cloud.folder / "there").unlink()
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1 and "UNAUTHENTICATED" in err and "retry" not in err
    assert _made_and_deleted(cloud) == (["create", "delete"] if when == "after" else [])


def test_a_slice_that_cannot_be_deleted_is_tried_again_at_the_end_and_spoken_of(cloud):
    (cloud.folder / "fail-delete").write_text("2")
    code, _, err = cloud.run(*OPTIONS, *RUN, codes="gone 0")
    assert code == 1 and err.count("could not delete pod in z; it costs money") == 2
    assert _made_and_deleted(cloud) == ["create", "delete", "delete"]


def test_no_more_slices_are_made_than_allowed(cloud):
    code, _, err = cloud.run(*OPTIONS, "--retries=2", *RUN, codes="gone gone gone 0")
    assert code == 75 and "no retry is left" in err
    assert cloud.verbs().count("create") == 3 and not cloud.exists()


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_slice_is_deleted_when_the_script_is_told_to_stop(cloud, number, expected):
    process = cloud.start(*OPTIONS, *RUN, codes="endless")
    cloud.wait_for_training(process)
    process.send_signal(number)
    process.wait(60)
    subprocess.run(
        ["pkill", "-f", f"{cloud.folder}/.*/vit-dist"]
    )  # the stand-in leaves it, where a deleted worker goes
    assert process.returncode == expected
    assert cloud.verbs()[-1] == "delete" and not cloud.exists()


def test_a_slice_that_is_there_already_is_used_and_left_only_when_that_is_asked_for(cloud):
    assert cloud.run(*OPTIONS, "--keep", *RUN)[0] == 0 and cloud.exists()
    code, _, err = cloud.run(*OPTIONS, *RUN)
    assert code == 1 and "error: there is a pod in z already, READY" in err
    assert cloud.exists() and cloud.verbs() == ["describe"]
    code, _, err = cloud.run(*OPTIONS, "--keep", *RUN)
    assert code == 0 and "kept: pod in z" in err
    assert cloud.exists() and not {"create", "delete"} & set(cloud.verbs())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--type=v5p-8", *RUN), "--zone is missing"),
        (("--zone=z", *RUN), "--type is missing"),
        ((*OPTIONS, "--retries=x", *RUN), "--retries=x is no whole number"),
        ((*OPTIONS, "--sport", *RUN), "--sport is no option"),
        ((*OPTIONS, "configs/digits.py"), "CONFIG and WORKDIR are missing"),
        ((*OPTIONS, "configs/none.py", "/mnt"), "there is no configs/none.py"),
    ],
)
def test_a_mistaken_command_is_refused_before_anything_is_called(cloud, arguments, said):
    code, _, err = cloud.run(*arguments)
    assert code == 2 and err.startswith("error: ") and said in err and cloud.calls() == []

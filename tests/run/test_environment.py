"""The environment: an entry for each session, with what a reader needs to explain a difference."""

import datetime
import json
import subprocess

import jax
import pytest

from vit_dist.config import ConfigError
from vit_dist.run.environment import _git, check_same_data, describe, write


def test_a_session_is_described(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"))
    session = describe(mesh, {"train": "ab12"})
    assert session["mesh"] == {"data": 2, "fsdp": 4}
    assert session["devices"] == {"platform": "cpu", "kind": "cpu", "count": 8, "processes": 1}
    assert session["versions"]["jax"] == jax.__version__
    assert (session["data"], session["xla_flags"]) == ({"train": "ab12"}, "--xla_dump_to=x")
    assert datetime.datetime.fromisoformat(session["time"]).utcoffset() == datetime.timedelta(0)
    assert describe(None, {})["mesh"] is None


def test_sessions_are_listed_in_order(tmp_path):
    for name in ("first", "second"):
        write(tmp_path, {"host": name, "data": {}})
    assert [session["host"] for session in json.loads((tmp_path / "environment.json").read_text())] == [
        "first",
        "second",
    ]


def test_a_digest_from_before_pixels_were_covered_is_not_compared(tmp_path, caplog):
    write(tmp_path, {"data": {"train": "ab12", "test": "cd34"}})
    check_same_data(tmp_path, {"train": "pixels:ef56", "test": "cd34"})
    assert caplog.messages == [
        f"data: the run in {tmp_path} kept a digest of the train split without pixels; not compared"
    ]
    write(tmp_path, {"data": {"train": "pixels:ef56", "test": "cd34"}})
    with pytest.raises(ConfigError, match=r"the train split has another content \(digest pixels:0000\)"):
        check_same_data(tmp_path, {"train": "pixels:0000", "test": "cd34"})


def test_the_commit_is_that_of_the_checkout_that_tracks_the_file(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    code = tmp_path / "code.py"
    code.write_text("1\n")
    git("init", "-q")
    assert _git(code) is None  # not a file of the checkout
    git("add", "code.py")
    assert _git(code) is None  # no commit yet
    git("commit", "-q", "-m", "one")
    assert _git(code) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    code.write_text("2\n")
    assert _git(code) == {"commit": git("rev-parse", "HEAD"), "dirty": True}

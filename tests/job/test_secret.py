"""Where a job's secret comes from, and where its process 0 listens."""

import concurrent.futures
import os
import re
import socket
import stat

import pytest

from vit_dist.config import ConfigError
from vit_dist.job import listening
from vit_dist.job.rank import Rank
from vit_dist.job.secret import FILE, VARIABLE, find_secret


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    for name in (VARIABLE, listening.OVERRIDE):
        monkeypatch.delenv(name, raising=False)


def test_the_variable_goes_before_the_file_and_makes_none(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "0123456789abcdef")
    assert find_secret(tmp_path) == b"0123456789abcdef" and not list(tmp_path.iterdir())


def test_processes_that_begin_together_make_one_file_that_its_owner_alone_may_read(tmp_path):
    old = os.umask(0)
    try:
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            found = set(pool.map(find_secret, [tmp_path / "new" / "run"] * 64))
    finally:
        os.umask(old)
    (file,) = (tmp_path / "new" / "run").iterdir()
    (secret,) = found
    assert re.fullmatch(rb"[0-9a-f]{64}", secret) and secret == file.read_bytes()
    assert file.name == FILE and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert find_secret(tmp_path / "new" / "run") == secret  # after a restart
    assert find_secret(tmp_path / "other") != secret


def test_a_job_without_a_workdir_has_an_empty_secret():
    assert find_secret(None) == b""


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o604])
def test_a_file_that_others_may_read_is_refused(mode, tmp_path):
    find_secret(tmp_path)
    (tmp_path / FILE).chmod(mode)
    with pytest.raises(ConfigError, match=f"{FILE}: its owner is .* its mode {mode:o}, expected .*; delete it"):
        find_secret(tmp_path)


@pytest.mark.parametrize("text", ["", "short", "x" * 5000])
def test_a_secret_of_a_wrong_length_is_refused(text, monkeypatch, tmp_path):
    monkeypatch.setattr("vit_dist.job.secret._WRITING_SECONDS", 0.1)
    (tmp_path / FILE).write_text(text)
    (tmp_path / FILE).chmod(0o600)
    with pytest.raises(ConfigError, match=f"{FILE}, which may be deleted: a secret of .* expected 16 to 1024"):
        find_secret(tmp_path)
    if text:
        monkeypatch.setenv(VARIABLE, text)
        with pytest.raises(ConfigError, match=f"{VARIABLE}: a secret of {len(text)} characters"):
            find_secret(tmp_path)


def test_a_workdir_that_cannot_hold_the_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"file/{FILE}: .*; or set {VARIABLE}"):
        find_secret(tmp_path / "file")


@pytest.mark.parametrize(
    ("coordinator", "addresses", "expected"),
    [
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
        ("localhost", ["127.0.0.1", "::1"], "127.0.0.1"),
        ("node0", ["127.0.1.1"], listening.EVERYWHERE),  # Debian's line for a host's own name
        ("node0", ["127.0.1.1", "10.9.8.7"], "10.9.8.7"),
        ("node0", ["10.9.8.7"], "10.9.8.7"),
        ("service", ["10.9.8.1"], listening.EVERYWHERE),  # no address of this host
        ("unknown", [], listening.EVERYWHERE),
    ],
)
def test_process_0_listens_at_the_coordinators_address_alone_if_its_host_has_it(
    coordinator, addresses, expected, monkeypatch
):
    ours = ("10.9.8.7", "127.0.0.1", "127.0.1.1", "::1")
    monkeypatch.setattr(listening, "_resolved", lambda host: addresses)
    monkeypatch.setattr(listening, "_is_of_this_host", lambda address: address in ours)
    assert listening.bind_host(Rank(f"{coordinator}:29500", 2, 0)) == expected


def test_jaxs_variable_names_another_address(monkeypatch):
    monkeypatch.setenv(listening.OVERRIDE, "[::1]:29500")
    assert listening.bind_host(Rank("10.0.0.1:29500", 2, 0)) == "::1"
    assert listening.joined("::1", 5) == "[::1]:5" and listening.joined("10.0.0.1", 5) == "10.0.0.1:5"
    monkeypatch.setenv(listening.OVERRIDE, "everywhere")
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_BIND_ADDRESS: expected HOST:PORT"):
        listening.bind_host(Rank("10.0.0.1:29500", 2, 0))


def test_addresses_are_looked_up_and_tried_for_real():
    assert listening._resolved("127.0.0.1") == ["127.0.0.1"] and listening._resolved("no.such.host.invalid") == []
    assert listening._is_of_this_host("127.0.0.1") and not listening._is_of_this_host("203.0.113.7")
    with listening.listen(Rank("127.0.0.1:0", 2, 0), "127.0.0.1") as listener:
        assert listener.getsockname()[0] == "127.0.0.1" and listener.family == socket.AF_INET

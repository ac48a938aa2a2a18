"""Whether all processes of a job see the same workdir, and when it holds a run."""

import json

import pytest

from vit_dist.config import ConfigError
from vit_dist.job import processes
from vit_dist.run import workdir as run_files


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoints/20").mkdir(parents=True)
    monkeypatch.setattr(run_files.time, "sleep", lambda seconds: None)
    return tmp_path


def test_a_disk_that_shows_another_host_a_checkpoint_late_is_waited_for(run, monkeypatch):
    late = iter([[True, []], [True, []], [True, [20]]])
    monkeypatch.setattr(processes, "gather", lambda view: [view, next(late)])
    run_files.check_shared(run)
    assert next(late, None) is None


def test_a_disk_that_the_hosts_do_not_share_is_refused(run, monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda view: [view, view, [False, []]])
    with pytest.raises(ConfigError, match=f"{run}: process 2 does not see what process 0 sees in it"):
        run_files.check_shared(run)


def test_an_incomplete_first_checkpoint_makes_no_run(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert not run_files.holds_run(tmp_path)
    (tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not run_files.holds_run(tmp_path) and run_files.checkpoint_steps(tmp_path) == []
    (tmp_path / "checkpoints" / "10").mkdir()
    (tmp_path / "checkpoints" / "9").mkdir()
    assert run_files.holds_run(tmp_path) and run_files.checkpoint_steps(tmp_path) == [9, 10]


@pytest.mark.parametrize("scan", [True, False])
def test_scan_that_is_left_to_the_program_is_that_of_the_run(tmp_path, scan):
    (tmp_path / "config.json").write_text(json.dumps({"total_steps": 1, "model": {"scan": scan, "num_classes": 2}}))
    wanted = run_files.read_config(tmp_path, ["model.scan=auto"])
    assert wanted.model.scan is scan
    with pytest.raises(ConfigError, match="model.scan"):
        run_files.read_config(tmp_path, [f"model.scan={not scan}"])

"""Where the rank of a process comes from: our own variables, a scheduler's, or nowhere."""

import pytest

from vit_dist.config import ConfigError
from vit_dist.job.rank import Rank, fake_devices, find_rank

OURS = {"VIT_DIST_COORDINATOR": "node0:1234", "VIT_DIST_PROCESSES": "4", "VIT_DIST_PROCESS": "3"}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "8192.0;tcp://10.1.2.3,10.1.2.4:34911",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}


@pytest.fixture
def rank_in(monkeypatch):
    """A function that returns what `find_rank` returns with these environment variables."""
    for name in (*OURS, *SLURM, *OPEN_MPI, "VIT_DIST_LOCAL_PROCESS", "CUDA_VISIBLE_DEVICES", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)

    def find(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return find_rank(1)

    return find


def test_a_process_without_a_job_has_no_rank(rank_in):
    assert rank_in({}) is None


@pytest.mark.parametrize(
    "alone",
    [
        OURS | {"VIT_DIST_PROCESSES": "1", "VIT_DIST_PROCESS": "0"},
        SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"},  # a batch script, not srun
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a pod, such as a notebook's
    ],
)
def test_a_job_of_one_process_is_no_job(rank_in, alone):
    assert rank_in(alone) is None


def test_variables_of_our_own_win_over_a_schedulers(rank_in):
    assert rank_in(SLURM | OURS) == Rank("node0:1234", 4, 3)


def test_each_process_of_a_host_takes_its_own_gpu(rank_in):
    assert rank_in(OURS | {"VIT_DIST_LOCAL_PROCESS": "2"}).devices == (2,)


def test_a_launched_process_takes_its_own_gpu_within_a_task_of_slurm_too(rank_in):
    step = {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NTASKS": "1"}  # srun --pty bash, and the launcher in it
    assert rank_in(SLURM | step | OURS | {"VIT_DIST_LOCAL_PROCESS": "2"}).devices == (2,)


def test_the_coordinator_of_a_slurm_task_is_the_first_node(rank_in):
    rank = rank_in(SLURM)
    assert rank.address[0] == "gpu07" and rank.address[1] > 2**15
    assert (rank.count, rank.index, rank.devices) == (4, 3, (1,))


@pytest.mark.parametrize(
    "assigned",
    [
        {"CUDA_VISIBLE_DEVICES": "5"},  # --gpus-per-task=1: each sees its own alone
        {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0"},  # one task has all GPUs of its node
    ],
)
def test_gpus_that_slurm_has_assigned_are_not_assigned_again(rank_in, assigned):
    assert rank_in(SLURM | assigned).devices == ()


def test_the_coordinator_of_an_open_mpi_rank_is_where_mpirun_runs(rank_in):
    rank = rank_in(OPEN_MPI)
    assert rank.address[0] == "10.1.2.3"
    assert (rank.count, rank.index, rank.devices) == (2, 1, (1,))


def test_an_open_mpi_that_names_no_coordinator_is_refused(rank_in):
    with pytest.raises(ConfigError, match="OMPI_COMM_WORLD_SIZE: .* start them by launch/mpi.sh, or set VIT_DIST_COO"):
        rank_in({name: value for name, value in OPEN_MPI.items() if name != "OMPI_MCA_orte_hnp_uri"})


def test_an_indexed_job_of_kubernetes_is_ignored_if_its_package_is_missing(rank_in):
    assert rank_in({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}) is None


@pytest.mark.parametrize("address", ["[::1]:80", "::1:80"])
def test_the_coordinator_may_be_an_ipv6_address(rank_in, address):
    assert rank_in(OURS | {"VIT_DIST_COORDINATOR": address}).address == ("::1", 80)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"VIT_DIST_PROCESS": ""}, r"VIT_DIST_PROCESS=\(unset\): all three must be set"),
        ({"VIT_DIST_COORDINATOR": "node0"}, "VIT_DIST_COORDINATOR must be host:port"),
        ({"VIT_DIST_COORDINATOR": "node0:99999"}, "VIT_DIST_COORDINATOR must be host:port"),
        ({"VIT_DIST_PROCESS": "4"}, "must be less than VIT_DIST_PROCESSES"),
        ({"VIT_DIST_LOCAL_PROCESS": "first"}, "VIT_DIST_LOCAL_PROCESS: expected a whole number, found 'first'"),
    ],
)
def test_variables_that_make_no_sense_are_refused(rank_in, wrong, message):
    with pytest.raises(ConfigError, match=message):
        rank_in(OURS | wrong)


def test_the_launchers_number_of_fake_devices_wins(monkeypatch):
    assert fake_devices(8) == 8
    monkeypatch.setenv("VIT_DIST_FAKE_DEVICES", "2")
    assert fake_devices(8) == fake_devices(0) == 2
    monkeypatch.setenv("VIT_DIST_FAKE_DEVICES", "two")
    with pytest.raises(ConfigError, match="VIT_DIST_FAKE_DEVICES: expected a whole number, found 'two'"):
        fake_devices(8)

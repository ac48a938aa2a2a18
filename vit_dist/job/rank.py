"""The rank of a process in its job: how many processes there are, which one this is, and the coordinator's address.

Said by variables of our own, which `vit-dist launch` and `launch/mpi.sh` set, or found by JAX, which knows SLURM, Open
MPI, GKE and GCE TPUs, and Kubernetes. A process that none of them speaks of is alone.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Mapping

from vit_dist.config import ConfigError

VARIABLES = ("VIT_DIST_COORDINATOR", "VIT_DIST_PROCESSES", "VIT_DIST_PROCESS")
LOCAL = "VIT_DIST_LOCAL_PROCESS"  # which process of its host it is, and so which GPU it takes; unset: all of them
FAKE_DEVICES = "VIT_DIST_FAKE_DEVICES"  # wins over the config's `fake_devices`


@dataclasses.dataclass(frozen=True)
class Rank:
    """One process of a job of several."""

    coordinator: str  # host:port on which process 0 listens
    count: int
    index: int
    devices: tuple[int, ...] = ()  # those of this host's that it takes; none: all

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def find_rank(start_seconds: int) -> Rank | None:
    """The rank of this process, or None where it is alone. Raises `ConfigError` for variables that make no sense.

    start_seconds: how long a cluster's own service may take to answer where process 0 is.
    """
    values = {name: os.environ.get(name, "") for name in VARIABLES}
    rank = _from_variables(values) if any(values.values()) else _from_cluster(start_seconds)
    # A job of one is no job, but for the GPU that the launcher has given it.
    return rank if rank is not None and (rank.count > 1 or rank.devices) else None


def fake_devices(wanted: int) -> int:
    """How many CPU devices to pretend to have: the launcher's word, where there is one, or else `wanted`."""
    asked = os.environ.get(FAKE_DEVICES, "")
    if asked and not asked.isdecimal():
        raise ConfigError(f"{FAKE_DEVICES}: expected a whole number, found {asked!r}")
    return int(asked) if asked else wanted


def _from_variables(values: Mapping[str, str]) -> Rank:
    found = ", ".join(f"{name}={value or '(unset)'}" for name, value in values.items())
    coordinator, count, index = values.values()
    if not coordinator or not count.isdecimal() or not index.isdecimal():
        raise ConfigError(f"{found}: all three must be set, the last two to whole numbers")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"{found}: {VARIABLES[0]} must be host:port, such as localhost:12345")
    if int(index) >= int(count):
        raise ConfigError(
            f"{found}: processes are numbered from 0, so the last one's number is below how many there are"
        )
    local = os.environ.get(LOCAL, "")
    if local and not local.isdecimal():
        raise ConfigError(f"{LOCAL}: expected a whole number, found {local!r}")
    return Rank(coordinator, int(count), int(index), (int(local),) if local else ())


def _from_cluster(start_seconds: int) -> Rank | None:
    """What JAX finds. It is only asked where several processes were started, for some of its ways need a network."""
    from jax._src import clusters  # behind `jax.distributed.initialize`, which tells nobody what it found

    in_tpu_pod = any(one.is_env_present() for one in clusters.ClusterEnv._cluster_types if "tpu" in one.name)
    if not in_tpu_pod and not _one_of_several():
        return None
    # A timeout makes its Kubernetes way wait until process 0 has a name; the others take no notice.
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, start_seconds)
    coordinator, count, index, local = found
    if coordinator is None or count is None or index is None:
        return None
    return Rank(coordinator, count, index, () if _gpus_are_dealt() else tuple(local or ()))


def _one_of_several() -> bool:
    """Whether srun, mpirun or a Kubernetes indexed job started this process among others, as far as it can tell."""
    counted = ("SLURM_STEP_NODELIST", "SLURM_NTASKS"), ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE")
    if any(mark in os.environ and os.environ.get(count, "1") != "1" for mark, count in counted):
        return True
    if os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "OMPI_COMM_WORLD_SIZE: mpirun has started several ranks, but this is Open MPI 5 or newer, which does not "
            f"say where to meet; start them by launch/mpi.sh, or set {', '.join(VARIABLES)}"
        )
    # JAX asks Kubernetes through its package; without it the variables of our own must do.
    return "JOB_COMPLETION_INDEX" in os.environ and importlib.util.find_spec("kubernetes") is not None


def _gpus_are_dealt() -> bool:
    """Whether SLURM has given this task its GPUs: it sees a single one, or has the whole node."""
    return "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",") or (
        os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1"
    )

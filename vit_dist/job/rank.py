"""The rank of a process in its job: how many processes there are, which one this is, and the coordinator's address.

The rank comes from environment variables of our own, which `vit-dist launch` and `launch/mpi.sh` set, or from JAX,
which detects SLURM, Open MPI, GKE and GCE TPUs, and Kubernetes. A process without any of these runs alone.
"""

import dataclasses
import importlib.util
import os
from collections.abc import Mapping

from vit_dist.config import ConfigError

VARIABLES = ("VIT_DIST_COORDINATOR", "VIT_DIST_PROCESSES", "VIT_DIST_PROCESS")
LOCAL = "VIT_DIST_LOCAL_PROCESS"  # the number of the process on its host, and so of its GPU; unset: it takes all GPUs
FAKE_DEVICES = "VIT_DIST_FAKE_DEVICES"  # overrides the config's `fake_devices`


@dataclasses.dataclass(frozen=True)
class Rank:
    """One process of a job of several."""

    coordinator: str  # host:port on which process 0 listens
    count: int
    index: int
    devices: tuple[int, ...] = ()  # which of its host's devices the process takes; empty: all

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def find_rank(start_seconds: int) -> Rank | None:
    """Returns the rank of this process, or None if it runs alone.

    Args:
      start_seconds: how long a cluster's own service may take to report the address of process 0.

    Raises:
      ConfigError: if an environment variable is missing, is not a number or is out of range.
    """
    values = {name: os.environ.get(name, "") for name in VARIABLES}
    rank = _from_variables(values) if any(values.values()) else _from_cluster(start_seconds)
    # A single process has no job to join, but it keeps the GPU that the launcher assigned to it.
    return rank if rank is not None and (rank.count > 1 or rank.devices) else None


def is_address(text: str) -> bool:
    """Returns whether the text is host:port."""
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 2**16


def fake_devices(configured: int) -> int:
    """Returns how many fake CPU devices to make: the launcher's number if it set one, else the configured one."""
    text = os.environ.get(FAKE_DEVICES, "")
    if text and not text.isdecimal():
        raise ConfigError(f"{FAKE_DEVICES}: expected a whole number, found {text!r}")
    return int(text) if text else configured


def _from_variables(values: Mapping[str, str]) -> Rank:
    shown = ", ".join(f"{name}={value or '(unset)'}" for name, value in values.items())
    coordinator, count, index = values.values()
    if not coordinator or not count.isdecimal() or not index.isdecimal():
        raise ConfigError(f"{shown}: all three must be set, the last two to whole numbers")
    if not is_address(coordinator):
        raise ConfigError(f"{shown}: {VARIABLES[0]} must be host:port, such as localhost:12345")
    if int(index) >= int(count):
        raise ConfigError(f"{shown}: {VARIABLES[2]} must be less than {VARIABLES[1]}, as processes are numbered from 0")
    local = os.environ.get(LOCAL, "")
    if local and not local.isdecimal():
        raise ConfigError(f"{LOCAL}: expected a whole number, found {local!r}")
    return Rank(coordinator, int(count), int(index), (int(local),) if local else ())


def _from_cluster(start_seconds: int) -> Rank | None:
    """Returns the rank that JAX detects.

    JAX is asked only if several processes were started: some of its ways of detection need a network.
    """
    from jax._src import clusters  # behind `jax.distributed.initialize`, which does not return what it detected

    in_tpu_pod = any(kind.is_env_present() for kind in clusters.ClusterEnv._cluster_types if "tpu" in kind.name)
    if not in_tpu_pod and not _is_one_of_several():
        return None
    # With a timeout, its Kubernetes way waits until process 0 has a name; the others ignore it.
    detected = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, start_seconds)
    coordinator, count, index, local = detected
    if coordinator is None or count is None or index is None:
        return None
    return Rank(coordinator, count, index, () if _scheduler_assigned_gpus() else tuple(local or ()))


def _is_one_of_several() -> bool:
    """Returns whether srun, mpirun or a Kubernetes indexed job started this process among others, if that is known."""
    counted = ("SLURM_STEP_NODELIST", "SLURM_NTASKS"), ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE")
    if any(mark in os.environ and os.environ.get(count, "1") != "1" for mark, count in counted):
        return True
    if os.environ.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        raise ConfigError(
            "OMPI_COMM_WORLD_SIZE: mpirun has started several ranks, but this is Open MPI 5 or newer, which does not "
            f"name a coordinator; start them by launch/mpi.sh, or set {', '.join(VARIABLES)}"
        )
    # JAX queries Kubernetes through its Python package; without that, only our own variables give the rank.
    return "JOB_COMPLETION_INDEX" in os.environ and importlib.util.find_spec("kubernetes") is not None


def _scheduler_assigned_gpus() -> bool:
    """Returns whether SLURM has assigned GPUs to this task: the task sees a single GPU, or has the node to itself."""
    return "," not in os.environ.get("CUDA_VISIBLE_DEVICES", ",") or (
        os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1"
    )

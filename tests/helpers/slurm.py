"""A SLURM cluster of two nodes on this machine, all of it in one folder: keys, configuration, state, logs.

Debian's `slurm-wlm` and `munge` are all it needs, and root, as whom SLURM's daemons run. The nodes are two addresses of
the loopback, so that their names can be looked up without a line in /etc/hosts, and each has a daemon of its own.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from vit_dist.job.launcher import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("127.0.0.1", "127.0.0.2")

_CONFIG = """
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillOnBadExit=1
"""


def missing():
    """Why no cluster can be started here; empty where one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "SLURM's daemons must be started as root"


class Cluster:
    """`with Cluster() as cluster:`; its commands run in `environment`, such as `cluster.run("squeue")`."""

    def __enter__(self):
        with contextlib.ExitStack() as opened:
            # not pytest's folder: the name of a socket has room for a hundred characters
            self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
            opened.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf")}
            self.environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # see tests/distributed/test_mpi.py
            self._configure()
            files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
            munge = [f"--{option}={self.folder}/munge.{suffix}" for option, suffix in files.items()]
            self._daemon(opened, "munged", "--foreground", "--force", "--num-threads=2", *munge)
            _until((self.folder / "munge.socket").exists, 20, self.logs)
            self._daemon(opened, "slurmctld", "-D", "-i")
            for node in NODES:
                self._daemon(opened, "slurmd", "-D", "-N", node)
            _until(self.idle, 60, self.logs)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *error):
        self._open.close()

    def run(self, *command):
        """What a command of SLURM's says on stdout."""
        ended = self._ended(command)
        assert ended.returncode == 0, f"{command}: {ended.stderr}"
        return ended.stdout.strip()

    def succeeds(self, *command):
        """Whether a command of SLURM's does what it is told, this time."""
        return self._ended(command).returncode == 0

    def idle(self):
        """Whether both nodes are there and have nothing to do."""
        return self._ended(("sinfo", "-h", "-o", "%T %D")).stdout.strip() == "idle 2"

    def state(self, job):
        """Such as PENDING, RUNNING or COMPLETED."""
        return self._shown(job).get("JobState", "")

    def restarts(self, job):
        return int(self._shown(job).get("Restarts", 0))

    def exit_code(self, job):
        return int(self._shown(job)["ExitCode"].split(":")[0])

    def logs(self):
        """The last lines of every daemon's log."""
        return "\n".join(f"{one.name}: {one.read_text()[-1500:]}" for one in self.folder.glob("*.log"))

    def _ended(self, command):
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)

    def _shown(self, job):
        words = self.run("scontrol", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _configure(self):
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        (self.folder / "state").mkdir()
        host = socket.gethostname().split(".")[0]
        controller_port, *ports = (free_port() for _ in (0, *NODES))
        text = _CONFIG.format(host=host, folder=self.folder, controller_port=controller_port)
        for node, port in zip(NODES, ports, strict=True):
            text += f"NodeName={node} NodeHostname={host} NodeAddr={node} Port={port} CPUs=1\n"
        text += f"PartitionName=all Nodes={','.join(NODES)} Default=YES State=UP\n"
        (self.folder / "slurm.conf").write_text(text)

    def _daemon(self, opened, name, *arguments):
        log = opened.enter_context(tempfile.NamedTemporaryFile(dir=self.folder, prefix=f"{name}-", suffix=".log"))
        process = subprocess.Popen(
            [name, *arguments], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder
        )
        opened.callback(_end, process)


def _path():
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _end(process):
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _until(condition, seconds, explain):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"nothing after {seconds} s:\n{explain()}"
        time.sleep(0.2)

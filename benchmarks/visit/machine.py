"""What the machine is: the device as jax sees it, the versions of what is installed, the driver, the processor."""

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from visit.job import Job

PACKAGES = (
    *("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "torch", "timm"),
    *("triton", "nvidia-cudnn-cu13", "nvidia-cublas", "opencv-python-headless", "simplejpeg"),
)
_SMI = ("name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")


def run(job: Job) -> None:
    """Keeps them. Does not ask for a GPU: who reads it decides."""
    processor = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in processor if line.startswith("model name")]
    job.keep(
        python=platform.python_version(),
        executable=sys.executable,
        cores=len(os.sched_getaffinity(0)),
        processor=models[0] if models else platform.machine(),
        versions={name: _version(name) for name in PACKAGES},
        nvidia_smi=_nvidia_smi(),
    )
    begun = time.perf_counter()
    import jax

    devices = jax.devices()
    job.keep(
        start_seconds=time.perf_counter() - begun,
        platform=devices[0].platform,
        device_kind=devices[0].device_kind,
        devices=len(devices),
        memory_limit=(devices[0].memory_stats() or {}).get("bytes_limit"),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi() -> str | None:
    """The driver's own line on the GPU; None where there is no such command."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None

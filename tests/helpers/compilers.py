"""Processes that see the compilers for TPUs and GPUs: libtpu reads its variables once, and tests have fake devices."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from system import ROOT

COMPILERS = os.environ.get("COMPILERS", "")  # the folder that `make compilers` fills


def run_python(*words, timeout=600):
    """The ended process of `python WORDS`; it must end well."""
    if not (COMPILERS and Path(COMPILERS, "libtpu").is_dir() and Path(COMPILERS, "jax_plugins").is_dir()):
        pytest.skip("NOT RUN: COMPILERS names no folder that holds libtpu and jax_plugins; run make test-slow")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "XLA_"))},
        "PYTHONPATH": COMPILERS,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    command = [sys.executable, *words]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended


def planned(recipe, target, *options, timeout=600):
    """What `vit-dist plan --json` says of a recipe in `configs/`, and the seconds that the process took."""
    begun = time.perf_counter()
    words = ["-m", "vit_dist", "plan", f"--config=configs/{recipe}.py", f"--target={target}", *options, "--json"]
    (line,) = run_python(*words, timeout=timeout).stdout.splitlines()
    return json.loads(line), time.perf_counter() - begun

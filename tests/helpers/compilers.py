"""Processes that see the compilers for TPUs and GPUs: libtpu reads its variables once, and tests have fake devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from system import ROOT

COMPILERS = os.environ.get("COMPILERS", "")  # the folder that `make compilers` fills


def run_python(*words, code=0):
    """The ended process of `python WORDS`; it must end with this exit code."""
    if not (COMPILERS and Path(COMPILERS, "libtpu").is_dir() and Path(COMPILERS, "jax_plugins").is_dir()):
        pytest.skip("NOT RUN: COMPILERS names no folder that holds libtpu and jax_plugins; run make compilers")
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "XLA_"))},
        "PYTHONPATH": COMPILERS,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }
    command = [sys.executable, *words]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert ended.returncode == code, ended.stderr[-3000:]
    return ended


def planned(recipe, target, *options):
    """What `vit-dist plan --json` says of a recipe in `configs/`."""
    words = ["-m", "vit_dist", "plan", f"--config=configs/{recipe}.py", f"--target={target}", *options, "--json"]
    (line,) = run_python(*words).stdout.splitlines()
    return json.loads(line)

"""`environment.json`: what each session of a run ran on.

It is the first thing to compare when two runs differ unexpectedly: versions, devices, mesh, code, data.
"""

import datetime
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vit_dist.config import ConfigError
from vit_dist.data.sets.examples import PIXELS
from vit_dist.run.files import ADVICE, TEXT, read_json, write_atomically

FILE = "environment.json"
_SESSION = {"data": {"*": TEXT}, "weights?": {"name": TEXT, "family": TEXT, "digest": TEXT, "license?": TEXT}}
PACKAGES = ("vit-dist", "jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint", "numpy")

_log = logging.getLogger(__name__)


def describe(
    mesh: jax.sharding.Mesh | None, data_fingerprints: Mapping[str, str], weights: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Describes this session.

    Args:
      mesh: the mesh of the run, if it has one.
      data_fingerprints: split -> digest.
      weights: what the session started from, if it opened `init.weights`.

    Returns:
      Values for JSON: `time, host, python, versions, devices, mesh, git, data, weights, xla_flags`. A version is None
      for a package that runs from a folder without being installed.
    """
    device = jax.devices()[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "mesh": None if mesh is None else dict(mesh.shape),
        "git": _git(Path(__file__)),
        "data": dict(data_fingerprints),
        "weights": None if weights is None else dict(weights),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def check_same_data(workdir: Path, data_fingerprints: Mapping[str, str]) -> None:
    """Raises `ConfigError` if a split differs from the one that the newest session in `workdir` read."""
    earlier = sessions(workdir)[-1]["data"]
    for split, digest in data_fingerprints.items():
        if digest.startswith(PIXELS) and not earlier.get(split, digest).startswith(PIXELS):
            _log.warning(
                "data: the run in %s kept a digest of the %s split without pixels; not compared",
                workdir,
                split,
            )
        elif earlier.get(split, digest) != digest:
            raise ConfigError(
                f"data: the {split} split has another content (digest {digest}) than the run in {workdir} was trained "
                f"with ({earlier[split]}); give it that data or choose another --workdir"
            )


def write(workdir: Path, session: Mapping[str, Any]) -> None:
    """Appends a session to the list in `workdir/environment.json`. Only process 0 calls it."""
    path = workdir / FILE
    earlier = sessions(workdir) if path.exists() else []
    write_atomically(path, json.dumps([*earlier, dict(session)], indent=2) + "\n")


def sessions(workdir: Path) -> list[dict[str, Any]]:
    """Returns the sessions of a run, at least one. Raises `ConfigError` for a file that is missing or damaged."""
    found = read_json(workdir / FILE, [_SESSION])
    if not found:
        raise ConfigError(f"{workdir / FILE}: holds no session; {ADVICE}")
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(file: Path) -> dict[str, Any] | None:
    """Returns the commit of the checkout that tracks `file`, and whether files differ from it; None if none does."""
    try:
        # first, because an installed copy may be inside the checkout of another project
        _run_git(file.parent, "ls-files", "--error-unmatch", file.name)
        commit = _run_git(file.parent, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_run_git(file.parent, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or one without a commit
        return None


def _run_git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

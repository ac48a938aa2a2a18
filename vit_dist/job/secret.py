"""The secret of a job, by which its processes know each other.

`vit-dist launch` on one host, and the files in `launch/`, make one for each job and export it as `VIT_DIST_JOB_SECRET`.
Without that, a job that has a workdir keeps one there, in a file that its user alone may read: whoever can read the
run may join it.

A job with neither, such as `bench` started by `srun`, has an empty secret. It assumes that only its own hosts reach
the coordinator's port, as jax does in any case; see `SECURITY.md`, "Ports".
"""

import contextlib
import os
import secrets
import stat
import time
from pathlib import Path

from vit_dist.config import ConfigError

VARIABLE = "VIT_DIST_JOB_SECRET"
FILE = ".job_secret"
_FEWEST_CHARACTERS = 16
_MOST_CHARACTERS = 1024
_WRITING_SECONDS = 5.0  # that another process may take between making the file and writing it


def new_secret() -> str:
    """Returns a random secret."""
    return secrets.token_hex(32)


def find_secret(workdir: Path | None) -> bytes:
    """Returns the secret of this process's job.

    Args:
      workdir: of the run, which all processes of the job share; it is made if it is missing. None: the job has none.

    Raises:
      ConfigError: for a secret that is too short or too long, and a file that others may read.
    """
    text = os.environ.get(VARIABLE, "")
    if text:
        return _checked(text, VARIABLE)
    if workdir is None:
        return b""
    file = workdir / FILE
    try:
        _make_if_missing(file)
        mode = file.stat()
        text = _read(file)
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}; or set {VARIABLE} to the same text for all processes") from error
    if mode.st_uid != os.getuid() or stat.S_IMODE(mode.st_mode) & 0o077:
        raise ConfigError(
            f"{file}: its owner is {mode.st_uid} and its mode {stat.S_IMODE(mode.st_mode):o}, expected {os.getuid()} "
            f"and 600; delete it, or set {VARIABLE} for all processes if this disk keeps no modes"
        )
    return _checked(text, f"{file}, which may be deleted")


def _make_if_missing(file: Path) -> None:
    """Makes the file with a new secret, unless another process is first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as stream:
            stream.write(new_secret().encode())


def _read(file: Path) -> str:
    """Returns the text of the file; waits a little for the process that has just made it."""
    deadline = time.monotonic() + _WRITING_SECONDS
    while not (data := file.read_bytes()[: _MOST_CHARACTERS + 1]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return data.decode("utf-8", "surrogateescape").strip()


def _checked(text: str, where: str) -> bytes:
    if not _FEWEST_CHARACTERS <= len(text) <= _MOST_CHARACTERS:
        raise ConfigError(
            f"{where}: a secret of {len(text)} characters, expected {_FEWEST_CHARACTERS} to {_MOST_CHARACTERS}; make "
            "one by: openssl rand -hex 32"
        )
    return text.encode("utf-8", "surrogateescape")

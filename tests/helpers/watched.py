"""Runs a command and keeps a folder as it stood after every one of its system calls that changed something there.

A kill at any moment leaves the folder as one of these copies. (A loss of power may leave less: what was not synced.)
"""

import dataclasses
import hashlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).with_name("watch_folder.c")


@dataclasses.dataclass(frozen=True)
class Copy:
    """A folder as it stood after a call, such as `rename /runs/x/checkpoints/4`."""

    call: str
    folder: Path


def watched(command: Sequence[str], folder: Path, keep: Path, **variables: str) -> list[Copy]:
    """Runs a command to its end, which must be exit code 0.

    Args:
      command: the command; its children are watched as well.
      folder: the folder.
      keep: a new folder for the copies; two in a row that do not differ are kept once.
      variables: of its environment.

    Returns:
      The copies, in order.
    """
    keep.mkdir()
    library = keep / "watch_folder.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl", "-lpthread"], check=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(keep / "socket"))
    listener.listen(64)
    copies: list[Copy] = []
    copier = threading.Thread(target=_copy_at_each_call, args=(listener, folder.resolve(), keep, copies), daemon=True)
    copier.start()
    environment = {
        **os.environ,
        **variables,
        "LD_PRELOAD": str(library),
        "WATCHED": str(folder.resolve()),
        "WATCHER": str(keep / "socket"),
    }
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        copier.join()
    assert done.returncode == 0, done.stderr[-3000:]
    return copies


def _copy_at_each_call(listener: socket.socket, folder: Path, keep: Path, copies: list[Copy]) -> None:
    last = ""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # closed
            return
        with connection:
            call = connection.makefile(encoding="utf-8", errors="surrogateescape").readline().rstrip("\n")
            digest = _digest(folder)
            if digest != last:
                copies.append(Copy(call, keep / f"{len(copies):04}"))
                shutil.copytree(folder, copies[-1].folder, symlinks=True)
                last = digest
            connection.sendall(b"\n")


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(os.fsencode(path.relative_to(folder)) + b"\0")
        if path.is_file():
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()

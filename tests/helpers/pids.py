"""Which processes of this machine run, by their numbers; looks into /proc, and so on Linux only."""

import time
from pathlib import Path


def alive(pid):
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(numbers, seconds=10.0):
    """Returns after how many seconds none of them runs; fails when one runs for longer."""
    begun = time.monotonic()
    while left := [one for one in numbers if alive(one)]:
        assert time.monotonic() < begun + seconds, f"{left} still run after {seconds} s"
        time.sleep(0.01)
    return time.monotonic() - begun


def ranks(launcher):
    """Rank -> process number of those that a launcher, a `Running`, has under it."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().decode("utf-8", "replace").split("\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended meanwhile, or is none of ours
        variables = dict(one.partition("=")[::2] for one in environment)
        if parent == launcher.process.pid and "VIT_DIST_PROCESS" in variables:
            found[int(variables["VIT_DIST_PROCESS"])] = int(folder.name)
    return found

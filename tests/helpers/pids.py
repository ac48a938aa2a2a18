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
    for number, environment in _children(launcher, "environ"):
        variables = dict(one.partition("=")[::2] for one in environment)
        if "VIT_DIST_PROCESS" in variables:
            found[int(variables["VIT_DIST_PROCESS"])] = number
    return found


def workers(running):
    """The process numbers of the data workers that a `Running` has under it."""
    return [number for number, words in _children(running, "cmdline") if any("spawn_main" in word for word in words)]


def _children(running, what):
    """Of each process that a `Running` has begun: its number, and the words of a file of its folder in /proc."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / what).read_bytes().decode("utf-8", "replace").split("\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended meanwhile, or is none of ours
        if parent == running.process.pid:
            yield int(folder.name), words

"""Two hosts on one machine: network namespaces joined by a cable that can be pulled.

Each host has a name and an address of its own, and reaches the other by nothing but the cable. Needs root and Linux's
`ip`; where these are missing, `why_not` says so.
"""

import os
import shutil
import subprocess
from pathlib import Path

ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
# Names that another checkout's tests on this machine do not take.
_SPACE = {host: f"{host}-{os.getpid()}" for host in ADDRESSES}
_CABLE = {host: f"{host[-1]}{os.getpid()}" for host in ADDRESSES}


def why_not():
    """The reason why this machine cannot be two hosts; None where it can."""
    if os.geteuid():
        return "network namespaces need root"
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        return f"{missing[0]} is not installed (Debian: iproute2, util-linux)"
    name = f"vit-dist-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None if tried.returncode == 0 else f"ip netns add: {tried.stderr.strip()}"


class Hosts:
    """`with Hosts() as hosts:` two hosts, `host-a` and `host-b`, that go with the block."""

    def __enter__(self):
        for host in ADDRESSES:
            _ip("netns", "add", _SPACE[host])
            names = Path("/etc/netns", _SPACE[host], "hosts")  # `ip netns exec` shows it as /etc/hosts
            names.parent.mkdir(parents=True, exist_ok=True)
            names.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in ADDRESSES.items()))
        ends = list(_CABLE.values())
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host, address in ADDRESSES.items():
            _ip("link", "set", _CABLE[host], "netns", _SPACE[host])
            _ip("-n", _SPACE[host], "addr", "add", f"{address}/24", "dev", _CABLE[host])
            _ip("-n", _SPACE[host], "link", "set", "lo", "up")
        self.plug()
        return self

    def __exit__(self, *error):
        self._remove()

    def plug(self):
        for host, cable in _CABLE.items():
            _ip("-n", _SPACE[host], "link", "set", cable, "up")

    def cut(self):
        _ip("-n", _SPACE["host-a"], "link", "set", _CABLE["host-a"], "down")

    def on(self, host, arguments):
        """The command that runs these arguments on a host, under its name."""
        named = 'hostname "$0" && exec "$@"'
        return ["ip", "netns", "exec", _SPACE[host], "unshare", "--uts", "sh", "-c", named, host, *arguments]

    def _remove(self):
        for space in _SPACE.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            shutil.rmtree(Path("/etc/netns", space), ignore_errors=True)


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True)

"""Where process 0 listens: at the address by which the other processes reach it, and not at all that its host has.

The coordinator's own name may mean another address on its host than elsewhere: Debian gives a host's name 127.0.1.1.
"""

import ipaddress
import logging
import os
import socket

from vit_dist.config import ConfigError
from vit_dist.job.rank import Rank, is_address

OVERRIDE = "JAX_COORDINATOR_BIND_ADDRESS"  # jax's own variable; host:port
EVERYWHERE = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
_log = logging.getLogger(__name__)


def bind_host(rank: Rank) -> str:
    """Returns the address to listen at, for our rendezvous and then for jax's service, without a port.

    It is that of the coordinator, if this host has it. A loopback address is taken only where the coordinator is given
    as one, or as localhost: then all processes are on this host. Otherwise all addresses of the host.
    """
    override = os.environ.get(OVERRIDE, "")
    if override:
        if not is_address(override):
            raise ConfigError(f"{OVERRIDE}: expected HOST:PORT, such as 10.0.0.1:29500, found {override!r}")
        return override.rpartition(":")[0].strip("[]")
    host = rank.address[0]
    given_as_loopback = host == "localhost" or _is_loopback(host)
    for address in _resolved(host):
        if (given_as_loopback or not _is_loopback(address)) and _is_of_this_host(address):
            return address
    _log.warning("%s: not an address of this host, so that process 0 listens at all of them (%s)", host, OVERRIDE)
    return EVERYWHERE


def listen(rank: Rank, host: str) -> socket.socket:
    """Returns a listening socket at the coordinator's port. Raises `ConfigError` if the port cannot be used."""
    port = rank.address[1]
    everywhere = host == "::"
    try:
        return socket.create_server(
            (host, port),
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            backlog=max(128, rank.count),
            dualstack_ipv6=everywhere and socket.has_dualstack_ipv6(),
        )
    except OSError as error:
        raise ConfigError(
            f"{rank.coordinator}: process 0 cannot listen at port {port} ({error.strerror}); choose another"
        ) from error


def joined(host: str, port: int) -> str:
    """Returns host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _resolved(host: str) -> list[str]:
    """Returns the addresses of a name, IPv4 first; none where it is not known yet."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [str(address[0]) for _, _, _, _, address in sorted(found, key=lambda entry: entry[0] != socket.AF_INET)]


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return False


def _is_of_this_host(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True

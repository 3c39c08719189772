"""The network addresses of this host, and listening on some of them and no other."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from rsb_cluster.errors import ConfigError

LOOPBACK = "127.0.0.1"

_SIOCGIFADDR = 0x8915  # linux/sockios.h


def listen(address: str) -> list[tuple[socket.socket, str]]:
    """Listen on free ports of some addresses of this host, and on no other.

    Args:
        address: The one address, or a name of it; empty: all of `reachable_addresses` that this host has, or else one
            of its public addresses, or without a network the loopback, as the scheduler's nodes may all be this host.

    Returns:
        Each socket, and the address by which it is reached; at least one.

    Raises:
        OSError: This host has no such address.
    """
    found, problem = [], OSError("there is no address")
    for candidate in [address] if address else reachable_addresses():
        try:
            found.append((_open(candidate), candidate))
        except OSError as error:  # the name of a host behind address translation stands for an address that it has not
            problem = OSError(f"{candidate}: {error.strerror or error}")
    for candidate in [] if address else [*_global_addresses(), LOOPBACK]:
        if not found:
            with contextlib.suppress(OSError):
                found.append((_open(candidate), candidate))
    if not found:
        raise problem
    return found


def _open(address: str) -> socket.socket:
    family, _, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    return socket.create_server(place[:2], family=family, backlog=1024)


def reachable_addresses() -> list[str]:
    """Return the addresses by which other hosts may reach this one.

    First what its name stands for and the address of its default route, then the private addresses of its other
    interfaces (a second network, InfiniBand). Who listens on a public address must have been told to, by the name.
    """
    found: list[str] = []
    with contextlib.suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # TEST-NET-1 (RFC 5737); a datagram socket sends nothing here
        found.append(str(probe.getsockname()[0]))
    others = [*interface_addresses().values(), *_ipv6_addresses()]
    found += [address for address in others if not ipaddress.ip_address(address).is_global]
    return [address for address in dict.fromkeys(found) if not _is_local(address)]


def _global_addresses() -> list[str]:
    return [a for a in (*interface_addresses().values(), *_ipv6_addresses()) if ipaddress.ip_address(a).is_global]


def _ipv6_addresses() -> list[str]:
    """Return the IPv6 addresses of this host's interfaces."""
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:  # IPv6 is off
        return []
    return [str(ipaddress.IPv6Address(int(line.split()[0], 16))) for line in lines]


def interface_addresses() -> dict[str, str]:
    """Return the IPv4 address of each network interface that has one, by its name."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # the interface has no address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def find_interface(address: str) -> str:
    """Return the name of the network interface that has an IPv4 address.

    Raises:
        ConfigError: No interface of this machine has the address.
    """
    for name, found in interface_addresses().items():
        if found == address:
            return name
    raise ConfigError(f"no network interface of this node has the address {address}.")


def _is_local(address: str) -> bool:
    """Whether an address is only for this host, or for the hosts on one cable."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    return parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified

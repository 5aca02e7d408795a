"""The interfaces of this host, and the addresses by which other hosts can reach it."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import re
import socket
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

_SIOCGIFCONF = 0x8912
_REQUEST_BYTES = 40
_MOST = 256

_INET6 = Path("/proc/net/if_inet6")

Interfaces = Sequence[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]
"""Names of interfaces with their addresses; one with several is there several times."""


def own_interfaces(inet6: Path = _INET6) -> Interfaces:
    """The interfaces of this host with their addresses, those of IPv4 first.

    Without loopback and addresses that are good on one link only.
    """
    found: Interfaces = [*_ipv4(), *_ipv6(inet6)]
    return [each for each in found if not each[1].is_loopback and not each[1].is_link_local]


def own_addresses(wanted: Sequence[str] = (), interfaces: Interfaces | None = None) -> list[str]:
    """The addresses of this host, if wanted those of some interfaces; see `chosen`.

    If there are none, loopback.
    """
    there = own_interfaces() if interfaces is None else interfaces
    names = chosen(wanted, there) if wanted else {name for name, _ in there}
    return [str(address) for name, address in there if name in names] or ["127.0.0.1"]


def chosen(wanted: Iterable[str], interfaces: Interfaces) -> list[str]:
    """The names of those interfaces that are wanted by name, or by their network.

    Args:
        wanted: Names, such as ``eth0``, and networks, such as ``10.0.0.0/24``.
        interfaces: Those that are there.
    """
    words = list(wanted)
    networks = [ipaddress.ip_network(word, strict=False) for word in words if "/" in word]
    names = [
        name
        for name, address in interfaces
        if name in words or any(address in network for network in networks)
    ]
    return list(dict.fromkeys(names))


def with_addresses(addresses: Iterable[str], interfaces: Interfaces) -> list[str]:
    """The names of the interfaces that have some addresses."""
    there = {ipaddress.ip_address(address) for address in addresses}
    return list(dict.fromkeys(name for name, address in interfaces if address in there))


def is_interface(word: str) -> bool:
    """Whether a word may be the name of an interface, or is a network."""
    if "/" not in word:
        return re.fullmatch(r"[A-Za-z0-9_.:@-]{1,15}", word) is not None
    try:
        ipaddress.ip_network(word, strict=False)
    except ValueError:
        return False
    return True


def _ipv4() -> list[tuple[str, ipaddress.IPv4Address]]:
    buffer = array.array("B", bytes(_MOST * _REQUEST_BYTES))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        address, length = buffer.buffer_info()
        answer = fcntl.ioctl(any_socket, _SIOCGIFCONF, struct.pack("iL", length, address))
    used = struct.unpack("iL", answer)[0]
    data = buffer.tobytes()
    # An ifreq: 16 bytes of name, then a sockaddr_in, whose address is its bytes 4 to 7. A second
    # address of an interface has a name such as eth0:1.
    return [
        (
            data[start : start + 16].partition(b"\0")[0].decode().partition(":")[0],
            ipaddress.IPv4Address(data[start + 20 : start + 24]),
        )
        for start in range(0, used, _REQUEST_BYTES)
    ]


def _ipv6(path: Path) -> list[tuple[str, ipaddress.IPv6Address]]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    words = [line.split() for line in lines if line.strip()]
    return [(each[-1], ipaddress.IPv6Address(bytes.fromhex(each[0]))) for each in words]

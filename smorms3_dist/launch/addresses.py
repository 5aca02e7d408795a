"""The addresses by which other hosts can reach this one."""

from __future__ import annotations

import array
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_SIOCGIFCONF = 0x8912
_REQUEST_BYTES = 40
_MOST = 256


def own_addresses(inet6: Path = Path("/proc/net/if_inet6")) -> list[str]:
    """The addresses of this host's interfaces, those of IPv4 first.

    Without loopback and those that are good on one link only; but if there are no others, loopback.
    """
    found: list[ipaddress.IPv4Address | ipaddress.IPv6Address] = [*_ipv4(), *_ipv6(inet6)]
    usable = [str(a) for a in found if not a.is_loopback and not a.is_link_local]
    return usable or ["127.0.0.1"]


def _ipv4() -> list[ipaddress.IPv4Address]:
    buffer = array.array("B", bytes(_MOST * _REQUEST_BYTES))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        address, length = buffer.buffer_info()
        answer = fcntl.ioctl(any_socket, _SIOCGIFCONF, struct.pack("iL", length, address))
    used = struct.unpack("iL", answer)[0]
    data = buffer.tobytes()
    # An ifreq: 16 bytes of name, then a sockaddr_in, whose address is its bytes 4 to 7.
    return [
        ipaddress.IPv4Address(data[start + 20 : start + 24])
        for start in range(0, used, _REQUEST_BYTES)
    ]


def _ipv6(path: Path) -> list[ipaddress.IPv6Address]:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    return [ipaddress.IPv6Address(bytes.fromhex(line.split()[0])) for line in lines if line.strip()]

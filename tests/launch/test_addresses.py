"""The addresses that agents on other hosts are told, and the interfaces that have them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from smorms3_dist.launch import addresses
from smorms3_dist.launch.addresses import Interfaces

import pytest

THERE: Interfaces = [
    (name, ip_address(text))
    for name, text in (
        ("docker0", "172.17.0.1"),
        ("eth0", "10.0.0.5"),
        ("eth0", "10.0.0.6"),
        ("eth0", "2001:db8::1"),
        ("ib0", "10.1.0.5"),
    )
]


def test_addresses_are_those_that_other_hosts_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ("lo", IPv4Address("127.0.0.1")) in addresses._ipv4(), "this host has it"
    inet6 = tmp_path / "if_inet6"
    inet6.write_text(
        "20010db8000000000000000000000001 02 40 00 80 eth0\n"
        "fe800000000000000000000000000001 02 40 20 80 eth0\n"
        "00000000000000000000000000000001 01 80 10 80 lo\n\n"
    )
    found = [IPv4Address(text) for text in ("127.0.0.1", "169.254.1.1", "10.0.0.5")]
    monkeypatch.setattr(addresses, "_ipv4", lambda: [("x", each) for each in found])
    assert addresses.own_interfaces(inet6) == [
        ("x", IPv4Address("10.0.0.5")),
        ("eth0", IPv6Address("2001:db8::1")),
    ]
    monkeypatch.setattr(addresses, "_ipv4", list)
    assert addresses.own_interfaces(tmp_path / "nothing") == []
    assert addresses.own_addresses(interfaces=[]) == ["127.0.0.1"]


def test_interfaces_are_chosen_by_name_by_network_and_by_address() -> None:
    assert addresses.own_addresses(interfaces=THERE)[:2] == ["172.17.0.1", "10.0.0.5"]
    assert addresses.own_addresses(["ib0", "10.0.0.0/31"], THERE) == ["10.1.0.5"]
    assert addresses.chosen(["10.0.0.0/8"], THERE) == ["eth0", "ib0"]
    assert addresses.chosen(["ib0", "2001:db8::/32"], THERE) == ["eth0", "ib0"]
    assert addresses.chosen(["eth1"], THERE) == []
    assert addresses.with_addresses(["10.0.0.6", "2001:db8::1"], THERE) == ["eth0"]


@pytest.mark.parametrize(
    ("word", "good"),
    [
        ("eth0", True),
        ("enp3s0f1", True),
        ("10.0.0.0/24", True),
        ("2001:db8::/32", True),
        ("10.0.0.0/33", False),
        ("", False),
        ("a b", False),
        ("a-name-too-long-for-it", False),
    ],
)
def test_what_names_an_interface(word: str, good: bool) -> None:
    assert addresses.is_interface(word) is good

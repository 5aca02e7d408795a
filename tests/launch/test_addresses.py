"""The addresses that agents on other hosts are told."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

from smorms3_dist.launch import addresses

import pytest


def test_addresses_are_those_that_other_hosts_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert IPv4Address("127.0.0.1") in addresses._ipv4(), "this host has it"
    inet6 = tmp_path / "if_inet6"
    inet6.write_text(
        "20010db8000000000000000000000001 02 40 00 80 eth0\n"
        "fe800000000000000000000000000001 02 40 20 80 eth0\n"
        "00000000000000000000000000000001 01 80 10 80 lo\n\n"
    )
    found = [IPv4Address(text) for text in ("127.0.0.1", "169.254.1.1", "10.0.0.5")]
    monkeypatch.setattr(addresses, "_ipv4", lambda: found)
    assert addresses.own_addresses(inet6) == ["10.0.0.5", "2001:db8::1"]
    monkeypatch.setattr(addresses, "_ipv4", list)
    assert addresses.own_addresses(tmp_path / "nothing") == ["127.0.0.1"]

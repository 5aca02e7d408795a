"""Hosts and slots, on the command line and in files."""

from __future__ import annotations

from pathlib import Path

from smorms3_dist.launch.hosts import Host, HostsError, parse_hosts, rank_hosts, read_hostfile

import pytest


def test_hosts_and_slots_are_read() -> None:
    expected = [("a", 2), ("b", 7), ("[fe80::1]", 3), ("[::2]", 7), ("10.0.0.1", 4)]
    assert parse_hosts("a:2, b ,[fe80::1]:3,[::2],10.0.0.1:4", 7) == expected
    for text in ("", "a,", "a:0", "a:-1", "a:1:2", "a b", "a;rm", "-x", "a:²"):
        with pytest.raises(HostsError):
            parse_hosts(text)


def test_a_file_may_have_comments_and_both_ways_to_give_slots(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# all\n\nh1 slots=4 max_slots=8  # the first\nh2:2\nh3\n")
    assert read_hostfile(path) == [Host("h1", 4), Host("h2", 2), Host("h3", 1)]
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(HostsError, match="it is not text"):
        read_hostfile(path)
    with pytest.raises(HostsError, match="nothing cannot be read: No such file"):
        read_hostfile(tmp_path / "nothing")


def test_errors_in_a_file_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    for text, message in (
        ("h1\nh2 slots=x\n", "line 2: h2 has 'x' slots"),
        ("h1 what\n", "line 1"),
        ("h1 slots\n", "is not a host with slots=NUMBER"),
        ("h1:2 slots=2\n", "line 1"),
        ("# none\n", "names no host"),
        ("h1\nh1\n", "named twice"),
    ):
        path.write_text(text)
        with pytest.raises(HostsError, match=message):
            read_hostfile(path)


def test_ranks_fill_one_host_after_the_other() -> None:
    hosts = [Host("a", 2), Host("b", 3)]
    assert rank_hosts(hosts, 5) == ["a", "a", "b", "b", "b"]
    assert rank_hosts(hosts, 3) == ["a", "a", "b"]

"""Hosts and their slots, as ``--hosts`` and host files name them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Host(NamedTuple):
    """A host, as ssh takes it, and the ranks that it gets at most."""

    name: str
    slots: int


class HostsError(ValueError):
    """A list of hosts is wrong."""


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]+\]")
_OPTIONS = ("slots=", "max_slots=", "max-slots=")


def parse_hosts(text: str, slots: int = 1) -> list[Host]:
    """Reads ``--hosts``, such as ``h1:2,h2``; ``slots`` is for hosts for which none are named."""
    entries = (_divided(entry.strip()) for entry in text.split(","))
    return _checked([_host(*entry, slots, f"--hosts {text}") for entry in entries])


def _divided(entry: str) -> tuple[str, str | None]:
    """The name and the slots of ``name:2``, ``name`` or ``[fe80::1]:2``."""
    match = re.fullmatch(r"(\[[^]]*\]|[^:\[]*):(.*)", entry)
    return (match[1], match[2]) if match else (entry, None)


def read_hostfile(path: Path, slots: int = 1) -> list[Host]:
    """Reads a host file: a host a line, with ``slots=2`` or ``:2`` after it, and ``#`` comments.

    ``slots`` is for hosts for which none are named.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise HostsError(f"{path} cannot be read: {reason}") from error
    found = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        where = f"{path}, line {number}"
        name, count = _divided(words[0])
        options = [word.partition("=") for word in words[1:]]
        counts = [value for option, mark, value in options if option + mark == "slots="]
        counts += [] if count is None else [count]
        known = all(option + mark in _OPTIONS for option, mark, _ in options)
        if not known or len(counts) > 1:
            raise HostsError(f"{where}: {line.strip()!r} is not a host with slots=NUMBER")
        found.append(_host(name, counts[0] if counts else None, slots, where))
    if not found:
        raise HostsError(f"{path} names no host")
    return _checked(found)


def _host(name: str, count: str | None, slots: int, where: str) -> Host:
    if not _NAME.fullmatch(name):
        raise HostsError(f"{where}: {name!r} is not the name of a host")
    if count is None:
        return Host(name, slots)
    if not count.isascii() or not count.isdigit() or int(count) == 0:
        raise HostsError(f"{where}: {name} has {count!r} slots; give a number from 1 up")
    return Host(name, int(count))


def _checked(hosts: list[Host]) -> list[Host]:
    names = [host.name for host in hosts]
    for name in names:
        if names.count(name) > 1:
            raise HostsError(f"{name} is named twice; give it all its slots at once")
    return hosts


def with_ranks(hosts: Sequence[Host], ranks: int) -> list[Host]:
    """The hosts, each for so many ranks; a `HostsError` if one has fewer slots."""
    for name, slots in hosts:
        if slots < ranks:
            raise HostsError(
                f"{ranks} ranks on each host are more than the {slots} slots of {name}"
            )
    return [Host(host.name, ranks) for host in hosts]


def rank_hosts(hosts: list[Host], ranks: int) -> list[str]:
    """The host of each rank: the slots of the first host, then those of the next."""
    everywhere = [host.name for host in hosts for _ in range(host.slots)]
    return everywhere[:ranks]

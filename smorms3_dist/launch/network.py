"""By which interfaces ranks talk: those that connect the hosts, and no others.

Left to themselves, MPI and NCCL try each interface that looks like one of the same network on two
hosts: Docker's, say, which has the same address on both and leads nowhere, so that a job hangs. The
connection of an agent to the launcher has shown which one does connect them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smorms3_dist.launch.addresses import Interfaces, chosen, own_interfaces, with_addresses
from smorms3_dist.launch.wire import Wire

_OF_OPEN_MPI = "btl_tcp_if_"
_SETTINGS_OF_USER = ".openmpi/mca-params.conf"


@dataclasses.dataclass(frozen=True)
class Connected:
    """How an agent has come to the launcher.

    Attributes:
        is_here: Whether it runs on the launcher's host.
        reached: The launcher's address that it has reached.
        interfaces: The names of the interfaces by which it has come, or which the user wants.
    """

    is_here: bool
    reached: str
    interfaces: tuple[str, ...]


def connected(connection: Wire, message: Mapping[str, Any]) -> Connected:
    """How an agent has come, by its connection and its greeting."""
    own, other = connection.addresses()
    names = tuple(str(name) for name in message.get("interfaces") or ())
    return Connected(own == other, own, names)


def greeting(connection: Wire, wanted: Sequence[str]) -> dict[str, Any]:
    """What an agent says of its interfaces: those by which it has come, or which are wanted."""
    there = own_interfaces()
    own, _ = connection.addresses()
    names = chosen(wanted, there) if wanted else with_addresses([own], there)
    return {"interfaces": names, "there": ", ".join(dict.fromkeys(name for name, _ in there))}


def interfaces_of(
    everybody: Mapping[int, Connected], wanted: bool, there: Interfaces | None = None
) -> dict[int, list[str]]:
    """The interfaces that each rank is to use; none are named if all ranks are on one host.

    Args:
        everybody: By the number of the rank.
        wanted: Whether the user has named them.
        there: The interfaces of the launcher's host; by default they are looked up.
    """
    if wanted:
        return {number: list(each.interfaces) for number, each in everybody.items()}
    others = [each for each in everybody.values() if not each.is_here]
    if not others:
        return {number: [] for number in everybody}
    here = with_addresses(
        {each.reached for each in others}, own_interfaces() if there is None else there
    )
    return {
        number: here if each.is_here else list(each.interfaces)
        for number, each in everybody.items()
    }


def variables(
    interfaces: Sequence[str],
    environment: Mapping[str, str],
    wanted: bool,
    infiniband: Path = Path("/sys/class/infiniband"),
) -> dict[str, str]:
    """Variables by which MPI, NCCL and UCX use some interfaces of this host.

    Args:
        interfaces: Their names; none to leave it to them.
        environment: What is set there stays, unless the user wants just these interfaces.
        wanted: Whether the user does.
        infiniband: Where the system lists devices for RDMA, from which UCX is not to be kept.
    """
    if not interfaces:
        return {}
    listed = ",".join(interfaces)
    found = {"NCCL_SOCKET_IFNAME": f"={listed}"}
    if not infiniband.is_dir() or not any(infiniband.iterdir()):
        found["UCX_NET_DEVICES"] = listed
    if not wanted:
        found = {name: value for name, value in found.items() if name not in environment}
    # Open MPI takes interfaces to use or not to use, not both.
    if wanted or not _open_mpi_knows(environment):
        found["OMPI_MCA_btl_tcp_if_include"] = listed
    return found


def _open_mpi_knows(environment: Mapping[str, str]) -> bool:
    """Whether the user has told Open MPI about interfaces."""
    if any(_OF_OPEN_MPI in name for name in environment):
        return True
    try:
        lines = Path(environment.get("HOME", "/"), _SETTINGS_OF_USER).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return False
    return any(line.strip().startswith(_OF_OPEN_MPI) for line in lines)

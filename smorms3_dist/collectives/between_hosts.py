"""How arrays go between hosts over MPI: in small messages, and each but once into a host.

Over TCP, Open MPI asks the receiver before it sends a large message, and the answer waits behind
what the receiver sends itself: so of two hosts that exchange large messages one sends at a time,
and half of the wire is idle. Small messages are sent unasked.

In an all-gather, one rank of each other host receives what a rank owns, and hands it on within its
host, where memory is shared. The ranks of a host share this work, owner by owner.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from smorms3_dist.collectives.base import PIECE_BYTES

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

MESSAGE_BYTES = 60 * 1024
"""The largest message between hosts: what Open MPI's TCP sends unasked, 64 KiB with its header.
38 MB both ways between two hosts at 1 Gbit/s, where the wire needs 305 ms: in such messages 316 ms,
of 64 KiB 400 to 450, of 256 KiB 330 to 355, of 2 MiB 460 to 630. At 10 Gbit/s, where processors are
the limit, they take as long as larger ones, and those of 32 KiB a fifth longer."""


class Hosts:
    """Which ranks share memory, and how the parts of an all-gather go between hosts.

    Args:
        hosts: The host of each rank, by any number that it has.
        rank: This rank.

    Attributes:
        here: The other ranks of this rank's host, the next one first.
        entries: A rank of each other host, the next host first, that receives what this one owns.
        entering: The ranks of other hosts whose parts this one receives, and hands on.
    """

    def __init__(self, hosts: Sequence[int], rank: int) -> None:
        self._hosts = tuple(hosts)
        self._host = self._hosts[rank]
        self._ranks: dict[int, list[int]] = {}
        for each, host in enumerate(self._hosts):
            self._ranks.setdefault(host, []).append(each)
        own = self._ranks[self._host]
        place = own.index(rank)
        self.here = own[place + 1 :] + own[:place]
        others = sorted(self._ranks.keys() - {self._host}, key=lambda h: (h < self._host, h))
        self.entries = [self._entry(rank, host) for host in others]
        strangers = [each for each, host in enumerate(self._hosts) if host != self._host]
        self.entering = [each for each in strangers if self._entry(each, self._host) == rank]

    def _entry(self, owner: int, host: int) -> int:
        """The rank of another host that receives what a rank owns."""
        place = self._ranks[self._hosts[owner]].index(owner)
        return self._ranks[host][place % len(self._ranks[host])]

    @property
    def are_one(self) -> bool:
        """Whether all ranks are on one host."""
        return len(self._ranks) == 1

    def source(self, owner: int) -> int:
        """The rank from which this one receives what another one owns."""
        if owner in self.here or owner in self.entering:
            return owner
        return self._entry(owner, self._host)

    def messages(self, peer: int, array: np.ndarray) -> Iterator[np.ndarray]:
        """The bytes of an array, as they go to or come from a rank: whole within a host."""
        data = array.view(np.uint8)
        largest = data.size if peer in self.here else MESSAGE_BYTES
        return (data[start : start + largest] for start in range(0, data.size, largest or 1))


def hosts_of(comm: MPI.Intracomm) -> Hosts:
    """Finds out which ranks share memory. Collective."""
    from mpi4py import MPI

    sharing = comm.Split_type(MPI.COMM_TYPE_SHARED)
    lowest = sharing.allreduce(comm.rank, MPI.MIN)
    sharing.Free()
    return Hosts(comm.allgather(lowest), comm.rank)


class HostwiseGather:
    """The all-gather of parts of one size between hosts, in place, piece by piece.

    While piece ``t`` of each part is handed on within its new hosts, piece ``t + 1`` is under way
    between them. The communicator carries no other messages meanwhile.
    """

    def __init__(self, comm: MPI.Intracomm, hosts: Hosts) -> None:
        from mpi4py import MPI

        self._comm = comm
        self._hosts = hosts
        self._byte = MPI.BYTE
        self._waitall = MPI.Request.Waitall
        self._limit = max(PIECE_BYTES // (comm.size - 1), MESSAGE_BYTES)
        from_others = {comm.rank, *hosts.entering}
        self._from_here = [owner for owner in range(comm.size) if owner not in from_others]

    def run(self, parts: np.ndarray) -> int:
        """Gives this rank the parts of the others.

        Args:
            parts: uint8, a row for each rank.

        Returns:
            How many bytes this rank has sent to others.
        """
        hosts, nbytes = self._hosts, parts.shape[1]
        entering, rest = self._start(0, parts)
        for turn in range(math.ceil(nbytes / self._limit)):
            next_entering, next_rest = self._start(turn + 1, parts)
            self._waitall(entering)
            for owner in hosts.entering:
                rest += self._send(owner, hosts.here, turn, parts)
            self._waitall(rest)
            entering, rest = next_entering, next_rest
        return nbytes * (len(hosts.entries) + len(hosts.here) * (1 + len(hosts.entering)))

    def _start(self, turn: int, parts: np.ndarray) -> tuple[list[Any], list[Any]]:
        """Posts what comes from other hosts in a turn, and all the rest but what is handed on."""
        hosts, rank = self._hosts, self._comm.rank
        entering = self._receive(hosts.entering, turn, parts)
        rest = self._receive(self._from_here, turn, parts)
        return entering, rest + self._send(rank, hosts.entries + hosts.here, turn, parts)

    def _receive(self, owners: Iterable[int], turn: int, parts: np.ndarray) -> list[Any]:
        return [
            self._comm.Irecv([message, self._byte], source, owner)
            for owner in owners
            for source in [self._hosts.source(owner)]
            for message in self._hosts.messages(source, self._piece(owner, turn, parts))
        ]

    def _send(
        self, owner: int, receivers: Iterable[int], turn: int, parts: np.ndarray
    ) -> list[Any]:
        return [
            self._comm.Isend([message, self._byte], receiver, owner)
            for receiver in receivers
            for message in self._hosts.messages(receiver, self._piece(owner, turn, parts))
        ]

    def _piece(self, owner: int, turn: int, parts: np.ndarray) -> np.ndarray:
        return parts[owner, turn * self._limit : (turn + 1) * self._limit]

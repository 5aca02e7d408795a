"""How arrays go between hosts over MPI: both ways at once, and each but once into a host.

Over TCP, Open MPI asks the receiver before it sends a large message, and the answer waits behind
what the receiver itself is sending: so of two hosts that exchange large messages one sends at a
time, and half of the wire is idle. Two things help. Small messages are sent unasked: gradients go
in such ones, since there is no place for more than a few pieces of them. Or all is asked for before
anything large is under way, for which each rank begins to send before it is ready to receive: so
parameters go, in large messages, which cost less.

In an all-gather, one rank of each other host receives what a rank owns, and hands it on within its
host, where memory is shared: unless all ranks of the host share the array itself. The ranks of a
host share this work, owner by owner.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

MESSAGE_BYTES = 60 * 1024
"""The largest message between hosts that is sent unasked: with its header, 64 KiB of Open MPI's
TCP. 38 MB both ways between two hosts at 1 Gbit/s, where the wire needs 305 ms: in such messages
316 ms, of 64 KiB 400 to 450, of 256 KiB 330 to 355, of 2 MiB 460 to 630. At 10 Gbit/s, where
processors are the limit, they take as long as those of 2 MiB, and of 32 KiB a fifth longer."""

HANDED_ON_BYTES = 1 << 22
"""What is handed on at once within a host, while more is under way between hosts. Of 1 MiB or of
40, gathering takes as long; asked for in time, all of them take 317 to 330 ms for the same bytes at
1 Gbit/s, and half as long as small messages at 10 Gbit/s."""


Gather = Generator[None, None, int]


class Hosts:
    """Which ranks share memory, and how the parts of an all-gather go between hosts.

    Args:
        hosts: The host of each rank, by any number that it has.
        rank: This rank.

    Attributes:
        number: The host of this rank.
        first: The lowest rank of this rank's host.
        is_first: Whether that is this rank.
        place: How many of them come before this rank.
        here: The other ranks of this rank's host, the next one first.
        entries: A rank of each other host, the next host first, that receives what this one owns.
        entering: The ranks of other hosts whose parts this one receives, and hands on.
    """

    def __init__(self, hosts: Sequence[int], rank: int) -> None:
        self._hosts = tuple(hosts)
        self.number = self._hosts[rank]
        self._ranks: dict[int, list[int]] = {}
        for each, host in enumerate(self._hosts):
            self._ranks.setdefault(host, []).append(each)
        own = self._ranks[self.number]
        self.first = own[0]
        self.is_first = rank == self.first
        place = self.place = own.index(rank)
        self.here = own[place + 1 :] + own[:place]
        others = sorted(self._ranks.keys() - {self.number}, key=lambda h: (h < self.number, h))
        self.entries = [self._entry(rank, host) for host in others]
        strangers = [each for each, host in enumerate(self._hosts) if host != self.number]
        self.entering = [each for each in strangers if self._entry(each, self.number) == rank]

    def _entry(self, owner: int, host: int) -> int:
        """The rank of another host that receives what a rank owns."""
        place = self._ranks[self._hosts[owner]].index(owner)
        return self._ranks[host][place % len(self._ranks[host])]

    @property
    def are_one(self) -> bool:
        """Whether all ranks are on one host."""
        return len(self._ranks) == 1

    @property
    def have_one_rank_each(self) -> bool:
        """Whether no two ranks are on one host."""
        return len(self._ranks) == len(self._hosts)

    def source(self, owner: int) -> int:
        """The rank from which this one receives what another one owns."""
        if owner in self.here or owner in self.entering:
            return owner
        return self._entry(owner, self.number)

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


Waitall = Callable[[list[Any]], Any]
"""Waits for requests of MPI's."""


def gather_in_pairs(comm: MPI.Intracomm, parts: np.ndarray, waitall: Waitall) -> Gather:
    """Gives this rank the parts of the others on its host. Collective.

    Args:
        comm: The communicator.
        parts: uint8, a row for each rank.
        waitall: Waits for requests.

    Returns:
        A generator that gives something once all messages are under way that can be yet. In the
        end it returns how many bytes this rank has sent to others. While one is under way, another
        one may begin, on all ranks alike; they are gone on with in the same order.
    """
    from mpi4py import MPI

    peers = peers_of(comm)
    requests = [comm.Irecv([parts[peer], MPI.BYTE], peer) for peer in peers]
    requests += [comm.Isend([parts[comm.rank], MPI.BYTE], peer) for peer in peers]
    yield
    waitall(requests)
    return parts.shape[1] * len(peers)


def gather_hostwise(
    comm: MPI.Intracomm, hosts: Hosts, parts: np.ndarray, waitall: Waitall, shared: bool = False
) -> Gather:
    """The same between hosts, for ranks of several of them; see `gather_in_pairs`.

    The communicator carries no other messages meanwhile.

    Args:
        comm: The communicator.
        hosts: Of its ranks.
        parts: uint8, a row for each rank.
        waitall: Waits for requests.
        shared: Whether nothing is handed on within a host: its ranks share what each receives.
    """
    from mpi4py import MPI

    here = [] if shared else hosts.here
    nbytes = parts.shape[1]
    starts = range(0, nbytes, HANDED_ON_BYTES)
    pieces = [slice(start, start + HANDED_ON_BYTES) for start in starts]

    def send(owner: int, receivers: Iterable[int], piece: slice) -> list[Any]:
        data = parts[owner, piece]
        return [comm.Isend([data, MPI.BYTE], receiver, owner) for receiver in receivers]

    def receive(owners: Iterable[int], piece: slice) -> list[Any]:
        return [
            comm.Irecv([parts[owner, piece], MPI.BYTE], hosts.source(owner), owner)
            for owner in owners
        ]

    # Sends come first: what they ask is on its way before this rank answers others.
    rest = [r for piece in pieces for r in send(comm.rank, hosts.entries + here, piece)]
    entering = [receive(hosts.entering, piece) for piece in pieces]
    received = {comm.rank, *hosts.entering}
    others = [owner for owner in range(comm.size) if owner not in received and not shared]
    rest += [request for piece in pieces for request in receive(others, piece)]
    yield
    for piece, requests in zip(pieces, entering, strict=True):
        waitall(requests)
        for owner in hosts.entering:
            rest += send(owner, here, piece)
    waitall(rest)
    return nbytes * (len(hosts.entries) + len(here) * (1 + len(hosts.entering)))


def sent_by(gather: Gather) -> int:
    """Brings a gather to its end; how many bytes this rank has sent to others."""
    try:
        while True:
            next(gather)
    except StopIteration as end:
        return int(end.value)


def peers_of(comm: MPI.Intracomm) -> list[int]:
    """The other ranks, the neighbour first, so that not everybody talks to rank 0 first."""
    return [(comm.rank + step) % comm.size for step in range(1, comm.size)]

"""Program: what ranks of one host exchange in a step, each by itself, from plain MPI calls.

With ``--over-tcp`` as ranks of different hosts do, over a link that has no limit: what is left is
what processors do for TCP.

``word``
    An all-reduce of 8 bytes, as before each step.
``exchange``
    Every rank sends every other one an equal part of an array, in pieces, as a reduce-scatter of
    gradients does, one piece under way while it waits for the one before, and does nothing with
    them.
``gather``
    An all-gather of such parts, in place.
``memcpy``
    A copy of the array by all ranks at once.
"""

from __future__ import annotations

import math
import os
from typing import Any

from smorms3_dist.bench import clock
from smorms3_dist.collectives.base import PIECE_BYTES
from smorms3_dist.collectives.between_hosts import Hosts, gather_hostwise, sent_by

import numpy as np

NBYTES = 64 << 20

_OVER_TCP = {
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,tcp",
    "MPIR_CVAR_NOLOCAL": "1",
}
"""What lets ranks of a host use TCP with each other: Open MPI's and MPICH's variables."""


def main() -> None:
    """Measures, as one of the ranks that mpirun has started."""
    parser = clock.arguments()
    parser.add_argument("--over-tcp", action="store_true")
    options = parser.parse_args()
    clock.end_after(options.limit)
    if options.over_tcp:
        os.environ.update(_OVER_TCP)
    from smorms3_dist.bench import ranks_of_mpi

    from mpi4py import MPI

    communicator = ranks_of_mpi.communicator(options.ranks)
    comm = communicator.mpi_comm
    ranks, rank, size = ranks_of_mpi.ranks(communicator), comm.rank, comm.size
    part = NBYTES // 8 // size
    source, target = np.ones(part * size), np.zeros(part * size)
    piece = math.ceil(PIECE_BYTES / 8 / max(size - 1, 1))
    received = np.zeros((2, size, piece))
    word = np.zeros(1, np.int64)
    # Each rank a host of its own, if they are to be.
    hosts = Hosts(range(size) if options.over_tcp else [0] * size, rank)
    timed = clock.Clock(ranks)

    def start(turn: int, offset: int) -> list[Any]:
        count = min(piece, part - offset)
        requests = []
        for distance in range(1, size):
            to, sender = (rank + distance) % size, (rank - distance) % size
            at = to * part + offset
            for message in hosts.messages(sender, received[turn % 2, sender, :count]):
                requests.append(comm.Irecv([message, MPI.BYTE], sender))
            for message in hosts.messages(to, source[at : at + count]):
                requests.append(comm.Isend([message, MPI.BYTE], to))
        return requests

    def exchange() -> None:
        under_way: list[Any] = []
        for turn, offset in enumerate(range(0, part, piece)):
            started = start(turn, offset)
            MPI.Request.Waitall(under_way)
            under_way = started
        MPI.Request.Waitall(under_way)

    def gather() -> None:
        if options.over_tcp:
            parts = target.view(np.uint8).reshape(size, -1)
            sent_by(gather_hostwise(comm, hosts, parts, MPI.Request.Waitall))
        else:
            comm.Allgather(MPI.IN_PLACE, target)

    def turn() -> None:
        timed("word", lambda: comm.Allreduce(MPI.IN_PLACE, word, MPI.BOR))
        timed("exchange", exchange)
        timed("gather", gather)
        timed("memcpy", lambda: np.copyto(target, source))

    turn()
    timed.repeat(turn, options)
    seconds = timed.slowest()
    if rank == 0:
        clock.write(options, bytes=source.nbytes, seconds=seconds, versions=ranks_of_mpi.versions())


if __name__ == "__main__":
    main()

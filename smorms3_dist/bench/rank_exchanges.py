"""Program: what ranks of one host exchange in a step, each by itself, from plain MPI calls.

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

from smorms3_dist.bench import clock, ranks_of_mpi
from smorms3_dist.collectives.base import PIECE_BYTES

import numpy as np
from mpi4py import MPI

NBYTES = 64 << 20


def main() -> None:
    """Measures, as one of the ranks that mpirun has started."""
    options = clock.arguments().parse_args()
    clock.end_after(options.limit)
    communicator = ranks_of_mpi.communicator(options.ranks)
    comm = communicator.mpi_comm
    ranks, rank, size = ranks_of_mpi.ranks(communicator), comm.rank, comm.size
    part = NBYTES // 8 // size
    source, target = np.ones(part * size), np.zeros(part * size)
    piece = math.ceil(PIECE_BYTES / 8 / max(size - 1, 1))
    received = np.zeros((2, size, piece))
    word = np.zeros(1, np.int64)
    timed = clock.Clock(ranks)

    def start(turn: int, offset: int) -> list[MPI.Request]:
        count = min(piece, part - offset)
        requests = []
        for distance in range(1, size):
            to, sender = (rank + distance) % size, (rank - distance) % size
            at = to * part + offset
            requests.append(comm.Irecv(received[turn % 2, sender, :count], sender))
            requests.append(comm.Isend(source[at : at + count], to))
        return requests

    def exchange() -> None:
        under_way: list[MPI.Request] = []
        for turn, offset in enumerate(range(0, part, piece)):
            started = start(turn, offset)
            MPI.Request.Waitall(under_way)
            under_way = started
        MPI.Request.Waitall(under_way)

    def turn() -> None:
        timed("word", lambda: comm.Allreduce(MPI.IN_PLACE, word, MPI.BOR))
        timed("exchange", exchange)
        timed("gather", lambda: comm.Allgather(MPI.IN_PLACE, target))
        timed("memcpy", lambda: np.copyto(target, source))

    turn()
    timed.repeat(turn, options)
    seconds = timed.slowest()
    if rank == 0:
        clock.write(options, bytes=source.nbytes, seconds=seconds, versions=ranks_of_mpi.versions())


if __name__ == "__main__":
    main()

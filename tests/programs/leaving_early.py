"""Ranks end before their first update. On MPI ranks.

leaving_early.py leaves     rank 1 ends, and the others come to their first update later
leaving_early.py freed      so does rank 1, which has freed the communicator; nobody makes an update
leaving_early.py alone      rank 0 alone has made an optimizer, over the communicator of all
leaving_early.py parts      rank 0 makes updates alone, the others make none
"""

from __future__ import annotations

import sys
import time

import smorms3_dist

import chainer
import chainer.links as L
import numpy as np
from mpi4py import MPI
from mpirun import report

how = sys.argv[1]
comm = MPI.COMM_WORLD.Dup()
rank = comm.rank


def update(comm: MPI.Intracomm, times: int = 1) -> str:
    """Makes an optimizer, and updates; returns what an update raises."""
    optimizer = smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm)
    optimizer.setup(L.Linear(3, 2))
    try:
        for _ in range(times):
            for param in optimizer.target.params():
                param.grad = np.ones_like(param.array)
            optimizer.update()
    except RuntimeError as error:
        return str(error)
    return ""


said = []
if how == "leaves":
    # Longer than rank 1 has patience.
    time.sleep(0 if rank == 1 else 1.5)
    said = [update(comm, times=0 if rank == 1 else 1) for _ in range(2)]
elif how == "freed":
    update(comm, times=0)
    comm.Free()
elif how == "alone":
    if rank == 0:
        update(comm, times=0)
else:
    part = comm.Split(rank == 0, rank)
    said = [update(MPI.COMM_SELF), update(part, times=2 if rank == 0 else 0)]
report(rank, said=said)

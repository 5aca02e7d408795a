"""Rank 1 ends, well or not, while rank 0 does something else than a step. On MPI ranks.

ending.py late FILE     rank 0 makes no more steps, and ends when rank 1 has made the file
ending.py fails FILE    rank 1 exits with status 3, and rank 0 waits for it elsewhere
ending.py waits FILE    rank 1 makes a step, to which rank 0 comes when somebody has made the file
ending.py steps FILE    rank 0 makes another step than rank 1
"""

import sys
import time
from pathlib import Path

import smorms3_dist

import chainer
import chainer.links as L
from mpi4py import MPI

how, end = sys.argv[1], Path(sys.argv[2])
rank = MPI.COMM_WORLD.rank
actual = chainer.optimizers.SMORMS3()
optimizer = smorms3_dist.create_multi_node_optimizer(actual, MPI.COMM_WORLD).setup(L.Linear(3, 2))
for _ in range(2):
    optimizer.target.cleargrads()
    optimizer.update()
if how == "waits":
    while rank == 0 and not end.exists():
        time.sleep(0.02)
    optimizer.update()
elif how == "steps":
    if rank == 0:
        optimizer.update()
elif rank == 1:
    print(rank, flush=True)
    end.touch()
    sys.exit(0 if how == "late" else 3)
elif how == "late":
    while not end.exists():
        time.sleep(0.02)
    # Rank 1 is in its last exchange by then, or comes to it later.
    print(rank, flush=True)
else:
    MPI.COMM_WORLD.Barrier()

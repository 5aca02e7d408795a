"""One rank leaves before the others; before that, ranks that do not do the same. On MPI ranks."""

from __future__ import annotations

from typing import Any

import smorms3_dist

import chainer
import chainer.links as L
import numpy as np
from mpi4py import MPI
from mpirun import report

rank = MPI.COMM_WORLD.rank


def optimizer_over(comm: MPI.Intracomm, **options: Any) -> Any:
    actual = chainer.optimizers.SMORMS3()
    made = smorms3_dist.create_multi_node_optimizer(actual, comm, **options)
    return made.setup(L.Linear(3, 2))


def update(optimizer: Any, times: int = 1) -> None:
    for _ in range(times):
        for param in optimizer.target.params():
            param.grad = np.ones_like(param.array)
        optimizer.update()


def different() -> str:
    """What is said where rank 0 gathers gradients and the others make a step."""
    optimizer = optimizer_over(MPI.COMM_WORLD)
    optimizer.keep_gradients = True
    update(optimizer, 2)
    try:
        update(optimizer) if rank else optimizer.gather_gradients()
    except RuntimeError as error:
        return str(error)
    return ""


def stopped() -> int:
    """How many steps are made where one rank has no more batches."""
    comm = MPI.COMM_WORLD.Dup()
    optimizer = optimizer_over(comm, uneven="stop")
    try:
        update(optimizer, 3 + rank)
        optimizer.no_more_batches()
    except smorms3_dist.NoMoreBatches:
        assert rank > 0
    optimizer.consolidate()
    # Neither a communicator that is freed nor an optimizer that is gone matters at the end.
    comm.Free()
    return optimizer.t


values: dict[str, Any] = {"different": different(), "t": stopped()}
# Two optimizers over communicators of their own; rank 1 leaves between their updates.
comms = [MPI.COMM_WORLD.Dup(), MPI.COMM_WORLD.Dup()]
first, second = map(optimizer_over, comms)
for _ in range(4):
    update(first)
    update(second)
if rank != 1:
    for key, optimizer in (("missed", second), ("again", second)):
        try:
            update(optimizer)
        except RuntimeError as error:
            values[key] = str(error)
report(rank, **values)

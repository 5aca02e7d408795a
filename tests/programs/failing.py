"""One rank fails in a way of its choice, while the others wait for it in a step."""

import os
import sys

import smorms3_dist

import chainer
import chainer.links as L
from mpi4py import MPI

how, rank = sys.argv[1], MPI.COMM_WORLD.rank
model = L.Linear(3, 2)
optimizer = smorms3_dist.create_multi_node_optimizer(
    chainer.optimizers.SMORMS3(), MPI.COMM_WORLD
).setup(model)
model.cleargrads()
optimizer.update()
if rank == 1:
    if how == "raise":
        raise ZeroDivisionError("as asked")
    if how == "fork":
        child = os.fork()
        if child == 0:
            raise ZeroDivisionError("in the child")
        os.waitpid(child, 0)
    if how == "hook":
        optimizer.add_hook(lambda _: 1 / 0, "dividing")
    if how == "scaling":
        optimizer.loss_scaling()
elif how == "model":
    # Whichever rank's model differs, all of them learn of it.
    model.W = chainer.Parameter(0, (7, 7))
optimizer.update()
print("not reached by a rank")

"""Trains over NCCL, also with ranks that share a GPU, and compares with the CPU."""

import smorms3_dist
from smorms3_dist.collectives import connect as transports

import chainer
import gpu_training as training
import models
from mpi4py import MPI
from mpirun import report

comm = MPI.COMM_WORLD
device = smorms3_dist.use_gpu(comm, allow_sharing=True)
# Whoever starts this has told NCCL how ranks can share a GPU.
transports._without_nccl = lambda host, places: None
make = chainer.optimizers.SMORMS3
distances = {}
for mode in ("sharded", "replicated"):
    theirs = models.Model()
    training.train_sharded(theirs, comm, make, gradients=mode)
    ours = training.move(models.Model(), f"@cupy:{device}")
    optimizer = training.train_sharded(ours, comm, make, gradients=mode, exact=True)
    assert type(optimizer.collectives).__name__ == "NcclCollectives"
    distances[mode] = training.relative(training.on_host(ours), theirs)
    assert distances[mode] < 1e-6, distances
report(comm.rank, distances=distances)

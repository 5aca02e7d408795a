"""Ranks that share the GPUs of this host train as they do on CPUs."""

import sys

import smorms3_dist

import chainer
import cupy
import gpu_training as training
import models
from mpi4py import MPI
from mpirun import report

comm = MPI.COMM_WORLD
device = smorms3_dist.use_gpu(comm, allow_sharing=True)
# Ranks of one GPU have a part of its memory each.
cupy.get_default_memory_pool().set_limit(fraction=0.8 / comm.size)
make = chainer.optimizers.SMORMS3
same_bits = {}
for mode in ("sharded", "replicated"):
    theirs = models.Model()
    training.train_sharded(theirs, comm, make, gradients=mode)
    ours = training.move(models.Model(), f"@cupy:{device}")
    optimizer = training.train_sharded(ours, comm, make, gradients=mode, exact=True)
    training.on_host(ours)
    expected = models.arrays(theirs)
    same_bits[mode] = all(
        models.bits(array) == models.bits(expected[name])
        for name, array in models.arrays(ours).items()
    )
sys.stdout.flush()
kind = type(optimizer.collectives).__name__
report(comm.rank, same_bits=same_bits, collectives=kind, one=kind if comm.size == 1 else "")

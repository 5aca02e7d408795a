"""Ranks that share the GPUs of this host train as they do on CPUs; with the argument nccl over it.

Whoever starts them with nccl has told NCCL how ranks can share a GPU.
"""

import sys

import smorms3_dist
from smorms3_dist.collectives import connect as transports
from smorms3_dist.optimizer import overlap

import chainer
import cupy
import gpu_training as training
import models
from mpi4py import MPI
from mpirun import report

comm = MPI.COMM_WORLD
device = smorms3_dist.use_gpu(comm, allow_sharing=True)
over_nccl = sys.argv[1:] == ["nccl"]
if over_nccl:
    transports._without_nccl = lambda host, locations: None
# Ranks of one GPU have a part of its memory each.
cupy.get_default_memory_pool().set_limit(fraction=0.8 / comm.size)
# Several buckets, also of a small model.
overlap.early_gpu_bucket_bytes = lambda size: 10_000 * size
make = chainer.optimizers.SMORMS3
# A single rank reduces nothing, unless that is to be sent in another dtype.
NARROW = {"narrow": {"gradients": "sharded", "communication_dtype": "bfloat16"}}
OPTIONS = {
    "sharded": {"gradients": "sharded"},
    **(NARROW if over_nccl else {}),
    "replicated": {"gradients": "replicated"},
    "late": {"gradients": "sharded", "double_buffering": True},
    "early": {"overlap": True},
    "gather": {"overlap_gather": True},
}
same_bits = {}
for mode, options in OPTIONS.items():
    # What goes on beside the passes needs a loss.
    has_loss = mode in ("early", "gather")
    train = training.train_by_losses if has_loss else training.train_sharded
    theirs = models.Model()
    train(theirs, comm, make, **options)
    ours = training.move(models.Model(), f"@cupy:{device}")
    optimizer = train(ours, comm, make, exact=True, **options)
    kind = type(optimizer.collectives).__name__
    if mode == "early":
        # Ranks are told otherwise why they do not reduce then.
        assert optimizer._overlap.has_order == (over_nccl and comm.size > 1)
    if mode == "gather":
        last = optimizer._overlap_gather._last
        assert (last is not None and not last.held) == (over_nccl and comm.size > 1)
    training.move(ours, "@numpy")
    expected = models.arrays(theirs)
    same_bits[mode] = all(
        models.bits(array) == models.bits(expected[name])
        for name, array in models.arrays(ours).items()
    )
    difference = training.relative(ours, theirs)
    if comm.rank == 0:
        # At once: the next mode may hang.
        told = f"{mode}: {kind}, differs by {difference:.1e}, same bits: {same_bits[mode]}"
        print(told, file=sys.stderr, flush=True)
    # NCCL sums in an order of its own, and in the dtype that is sent.
    assert difference < (1e-4 if mode == "narrow" else 1e-6)
    assert kind == "NcclCollectives" or not over_nccl
report(comm.rank, same_bits=same_bits, collectives=kind)

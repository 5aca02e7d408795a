"""Runs the checks of the collectives on MPI ranks, over each kind of communicator."""

import pickle
import resource
import warnings

import smorms3_dist  # noqa: F401  (patches Chainer)
from smorms3_dist.collectives import base
from smorms3_dist.collectives.between_hosts import Hosts
from smorms3_dist.collectives.chainermn import REQUIRED_METHODS, CommunicatorCollectives
from smorms3_dist.collectives.connect import connect
from smorms3_dist.collectives.mpi import MpiCollectives
from smorms3_dist.layout import FlatLayout, ParameterSpec

import chainermn
import collective_checks
import numpy as np
from mpi4py import MPI
from mpirun import report


class InterfaceOnly:
    """ChainerMN's communicator interface without an MPI communicator behind it."""

    def __init__(self, communicator):
        self.rank, self.size = communicator.rank, communicator.size
        for name in REQUIRED_METHODS:
            setattr(self, name, getattr(communicator, name))


# ChainerMN says so of its own alltoall.
warnings.filterwarnings("ignore", "chainermn.* is experimental", FutureWarning)

base.PIECE_BYTES = base.SMALLEST_PIECE_BYTES
naive = chainermn.create_communicator("naive")
kinds = {}
for communicator, expected in (
    (MPI.COMM_WORLD, MpiCollectives),
    (naive, MpiCollectives),
    (InterfaceOnly(naive), CommunicatorCollectives),
):
    collectives = connect(communicator)
    assert type(collectives) is expected
    for check in collective_checks.CHECKS:
        check(collectives)
    kinds[type(communicator).__name__] = [
        collectives.bytes_sent[operation]
        for operation in ("reduce_scatter", "all_gather", "broadcast")
    ]
# As if ranks were on different hosts: first some of them together, then each alone.
for hosts in [0, 1, 1], [0, 1, 2]:
    scattered = connect(MPI.COMM_WORLD)
    scattered.hosts = Hosts(hosts[: scattered.size], scattered.rank)
    for check in collective_checks.CHECKS:
        check(scattered)


def faults_of_gathering(collectives: MpiCollectives) -> int:
    """Page faults of gathering 48 MiB once more, however ranks are spread over hosts."""
    specs = [ParameterSpec("/p", (12 << 20,), "float32")]
    group = FlatLayout(specs, collectives.size).groups[0]
    flat = np.ones(group.size, group.dtype)
    before = 0
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        collectives.all_gather(flat, group.buckets)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


try:
    pickle.dumps(connect(MPI.COMM_WORLD))
except TypeError as error:
    refusal = str(error)
report(
    MPI.COMM_WORLD.rank,
    bytes_sent=kinds,
    refusal=refusal,
    faults=max(map(faults_of_gathering, (scattered, connect(MPI.COMM_WORLD)))),
)

"""Runs the checks of the collectives on MPI ranks, over each kind of communicator."""

import gc
import pickle
import resource
import warnings

import smorms3_dist
from smorms3_dist.collectives import base
from smorms3_dist.collectives.between_hosts import Hosts
from smorms3_dist.collectives.chainermn import REQUIRED_METHODS, CommunicatorCollectives
from smorms3_dist.collectives.connect import connect
from smorms3_dist.collectives.mpi import MpiCollectives
from smorms3_dist.layout import FlatLayout, ParameterSpec

import chainer
import chainermn
import collective_checks
import numpy as np
from chainer.optimizers import SMORMS3
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


def trained(hosts, **options):
    """An optimizer after some steps, as if ranks were on these hosts, and what it has sent."""
    optimizer = smorms3_dist.create_multi_node_optimizer(SMORMS3(), naive, **options)
    if hosts is not None:
        optimizer.collectives.hosts = Hosts(hosts[: naive.size], naive.rank)
    model = chainer.Link()
    for name, size in (("a", 600_001), ("b", 7), ("c", 0)):
        model.add_param(name, (size,))
        getattr(model, name).array[...] = 1 + naive.rank
    optimizer.setup(model)
    for step in range(3):
        for param in model.params():
            param.grad = np.linspace(-1, step + naive.rank, param.size, dtype="f")
        optimizer.update()
    return optimizer


def bytes_of_memory_files():
    """What this rank has of files in memory, each byte divided by the processes that have it."""
    sizes = []
    with open("/proc/self/smaps") as file:
        for line in file:
            if "-" in line.split()[0]:
                counts = "memfd:smorms3_dist" in line
            elif counts and line.startswith("Pss:"):
                sizes.append(1024 * int(line.split()[1]))
    return sum(sizes)


def check_shared_parameters():
    """Ranks of a host have one array of parameters, with the bits that each has of its own."""
    narrow = {"gather_dtype": "bfloat16"}
    for hosts, options in (None, {}), ([0, 1, 1], {}), ([0, 1, 1], narrow):
        private, shared = (trained(hosts, share_parameters=s, **options) for s in (False, True))
        several = naive.size > (1 if hosts is None else 2)
        assert shared.sharded_model.shares is several
        for name in "abc":
            one, other = (getattr(o.target, name).array.tobytes() for o in (private, shared))
            assert one == other, (hosts, options, name)
        sent = shared.collectives.bytes_sent["all_gather"]
        assert (sent > 0) is (hosts is not None and naive.size > 1)
        array = shared.target.a.array
        gc.collect()  # what was shared before
        naive.mpi_comm.Barrier()
        # Each byte once, and perhaps the rest of a huge page.
        held = naive.mpi_comm.allreduce(bytes_of_memory_files())
        number = (1 if hosts is None else 2) * several
        less, more = held - number * array.nbytes + 8192, number * (array.nbytes + (9 << 18))
        assert less >= 0 and held <= more, (held, number, array.nbytes)
        if naive.rank == 0:
            array[5] = 77
        naive.mpi_comm.Barrier()
        here = naive.rank == 0 or hosts is None
        assert (array[5] == 77) == here, "what one rank writes, its host sees"
        naive.mpi_comm.Barrier()
        del private, shared, array


check_shared_parameters()

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

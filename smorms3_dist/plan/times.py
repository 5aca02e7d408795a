"""How long a step takes besides the forward and the backward pass: an estimate.

Communication takes a start-up time a message and the time of its bytes at the bandwidth of the
link that has most to carry. A *ring* of N ranks passes (N-1)/N of an array of B bytes over each
link in N-1 messages: ``(N-1) a + (N-1)/N B/b`` for a reduce-scatter or an all-gather, twice that
for an all-reduce, which no algorithm does with fewer bytes (R. Thakur, R. Rabenseifner, W. Gropp,
"Optimization of collective communication operations in MPICH", 2005; P. Patarasuk, X. Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009). Rings enter and leave
each node once. In the *pairwise* exchange of `smorms3_dist.collectives.mpi` every rank sends to
every other itself: of each of the g ranks of a node (N-g)/N of its gradients leave the node.

An update is bound by memory: it takes the bytes that a single pass must read and write. Nothing is
assumed to overlap, though in fact pieces are updated while others are under way; rules that run
their own code take several passes on CPUs. So this says where the time goes, not more.
"""

from __future__ import annotations

import dataclasses
import math

from smorms3_dist.plan.memory import chainermn_sent_itemsize, piece_bytes
from smorms3_dist.plan.setup import Group, Setup

import numpy as np


@dataclasses.dataclass(frozen=True)
class Speeds:
    """A machine.

    Attributes:
        inside: Bytes a second that a rank sends to others of its node.
        between: Bytes a second that a node sends to others, all its ranks together.
        memory: Bytes a second that a rank reads and writes in its memory.
        latency: Seconds that a message takes to start.
    """

    inside: float
    between: float
    memory: float
    latency: float


_GPUS = Speeds(inside=300e9, between=50e9, memory=2000e9, latency=5e-6)

SPEEDS = {
    "nccl": _GPUS,
    "cuda-aware": _GPUS,
    "staged": Speeds(inside=5e9, between=12.5e9, memory=2000e9, latency=20e-6),
    "host": Speeds(inside=5e9, between=1.25e9, memory=20e9, latency=2e-6),
}
"""What is assumed, by transport, where nothing is given: GPUs of 2 TB/s with NVLink of the third
generation, in nodes with a link of 400 Gbit/s; with copies through host memory, of 100 Gbit/s; CPUs
whose cores share memory, in nodes with a link of 10 Gbit/s."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a step.

    Attributes:
        pack: Gradients are copied into buckets, and back if they are unpacked.
        reduce: The reduce-scatter of gradients, or their all-reduce.
        gather_gradients: The all-gather of whole mean gradients.
        update: The update of the parameters that a rank owns.
        all_gather: That of the parameters.
    """

    pack: float
    reduce: float
    gather_gradients: float
    update: float
    all_gather: float

    @property
    def total(self) -> float:
        """All of it, one after the other."""
        return sum(dataclasses.astuple(self))


def times(setup: Setup, speeds: Speeds, ranks_per_node: int) -> Times:
    """Estimates a step.

    Args:
        setup: The model and how it is trained.
        speeds: The machine.
        ranks_per_node: Ranks of a node, as far as there are so many.
    """
    gathered = sum(
        _ring(setup, g, setup.flat_size(g) * g.dtype.itemsize, speeds, ranks_per_node)
        for g in setup.groups
    )
    pack = 0.0
    if setup.transport == "nccl":
        pack = sum(
            g.elements * g.dtype.itemsize + setup.flat_size(g) * setup.sent_dtype(g).itemsize
            for g in setup.groups
        )
    updated = sum(
        (setup.shard_sizes(g) * update_bytes(setup, g) for g in setup.groups),
        np.zeros(setup.ranks, np.int64),
    )
    return Times(
        pack=pack / speeds.memory,
        reduce=sum(_reduce(setup, g, speeds, ranks_per_node) for g in setup.groups),
        gather_gradients=gathered if setup.replicated else 0.0,
        update=float(updated.max()) / speeds.memory,
        all_gather=gathered,
    )


def chainermn_times(setup: Setup, speeds: Speeds, ranks_per_node: int) -> Times:
    """Estimates a step of ChainerMN: an all-reduce, and the update of everything on every rank."""
    pack, reduced, updated = 0.0, 0.0, 0.0
    for group in setup.groups:
        nbytes = group.elements * chainermn_sent_itemsize(setup, group)
        reduced += 2 * _in_ring(setup.ranks, nbytes, speeds, ranks_per_node)
        updated += group.elements * update_bytes(setup, group)
        if not setup.on_host:
            pack += 2 * (group.elements * group.dtype.itemsize + nbytes)
    return Times(pack / speeds.memory, reduced, 0.0, updated / speeds.memory, 0.0)


def update_bytes(setup: Setup, group: Group) -> int:
    """Bytes that the update of one element reads and writes at least.

    The gradient is read, states are read and written, and so is the parameter, or its fp32 master,
    of which the parameter is written as well.
    """
    states = 2 * setup.states * setup.state_itemsize(group)
    parameter = 2 * 4 + 2 if setup.has_masters(group) else 2 * group.dtype.itemsize
    return group.dtype.itemsize + parameter + states


def _ring(setup: Setup, group: Group, nbytes: int, speeds: Speeds, ranks_per_node: int) -> float:
    """A ring for each bucket."""
    waits = max(setup.buckets(group) - 1, 0) * (setup.ranks - 1) * speeds.latency
    return waits + _in_ring(setup.ranks, nbytes, speeds, ranks_per_node)


def _in_ring(ranks: int, nbytes: int, speeds: Speeds, ranks_per_node: int) -> float:
    slowest = speeds.inside if ranks <= ranks_per_node else min(speeds.inside, speeds.between)
    return (ranks - 1) * speeds.latency + (ranks - 1) / ranks * nbytes / slowest


def _reduce(setup: Setup, group: Group, speeds: Speeds, ranks_per_node: int) -> float:
    ranks = setup.ranks
    if setup.transport == "nccl":
        nbytes = setup.flat_size(group) * setup.sent_dtype(group).itemsize
        return _ring(setup, group, nbytes, speeds, ranks_per_node)
    if ranks == 1:
        return 0.0
    nbytes = group.elements * group.dtype.itemsize
    here = min(ranks_per_node, ranks)
    inside = (ranks - 1) / ranks * nbytes / speeds.inside
    between = here * (ranks - here) / ranks * nbytes / speeds.between
    turns = math.ceil(nbytes / ranks / piece_bytes(setup))
    return turns * (ranks - 1) * speeds.latency + max(inside, between)

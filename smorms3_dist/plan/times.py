"""How long a step takes besides the forward and the backward pass: an estimate.

Communication takes a start-up time a message and the time of its bytes at the bandwidth of the
link that has most to carry. A *ring* of N ranks passes (N-1)/N of an array of B bytes over each
link in N-1 messages: ``(N-1) a + (N-1)/N B/b`` for a reduce-scatter or an all-gather, twice that
for an all-reduce, which no algorithm does with fewer bytes (P. Patarasuk, X. Yuan, "Bandwidth
optimal all-reduce algorithms for clusters of workstations", 2009). Rings enter and leave each node
once. In the *pairwise* exchange of `smorms3_dist.collectives.mpi` every rank sends to every other
itself: of each of the g ranks of a node (N-g)/N of its gradients leave the node. In its all-gather
each part enters a node once, and is handed on there meanwhile, unless ranks share parameters.

An update is bound by memory: it takes the bytes that a single pass must read and write. Nothing is
assumed to overlap, though in fact pieces are updated while others are under way; rules that run
their own code take several passes on CPUs. So this says where the time goes, not more.
"""

from __future__ import annotations

import dataclasses
import math

from smorms3_dist.layout import GroupLayout
from smorms3_dist.plan.demand import chainermn_gradient_bytes, piece_bytes
from smorms3_dist.plan.setup import Setup, elements, gradient_bytes

import numpy as np


@dataclasses.dataclass(frozen=True)
class Speeds:
    """A machine: bytes a second, and the seconds that a message takes to start.

    They are those that a rank sends to others of its node, that a node sends to others, all its
    ranks together, and that a rank reads and writes in its memory.
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


Table = dict[str, float]
"""Seconds by what takes them, and the ``total``: one after the other."""


def times(setup: Setup, speeds: Speeds) -> Table:
    """Estimates a step.

    ``pack`` is the time in which gradients are copied into buckets; ``gather_gradients`` that of
    the all-gather of whole mean gradients.
    """
    packed, reduced, gathered, whole = 0, 0.0, 0.0, 0.0
    updated = np.zeros(setup.ranks, np.int64)
    for group in setup.groups:
        # A ring or the like for each bucket.
        rings = max(len(group.buckets), 1)
        gather = _ring if setup.transport in ("nccl", "cuda-aware") else _hostwise
        whole += gather(setup, group.size * group.dtype.itemsize, speeds, rings)
        nbytes = group.size * setup.gathered_dtype(group).itemsize
        gather = _into_nodes if setup.share_parameters else gather
        gathered += gather(setup, nbytes, speeds, rings)
        updated += setup.shard_sizes(group) * update_bytes(setup, group)
        if setup.transport == "nccl":
            sent = group.size * setup.sent_dtype(group).itemsize
            # A single rank reads them where they lie.
            packed += gradient_bytes(group) + sent if setup.ranks > 1 else 0
            reduced += _ring(setup, sent, speeds, rings)
        else:
            reduced += _pairwise(setup, group, speeds)
    return _table(
        pack=packed / speeds.memory,
        reduce=reduced,
        gather_gradients=whole if setup.replicated else 0.0,
        update=float(updated.max()) / speeds.memory,
        all_gather=gathered,
    )


def chainermn_times(setup: Setup, speeds: Speeds) -> Table:
    """Estimates a step of ChainerMN: an all-reduce, and the update of everything on every rank."""
    packed, reduced, updated = 0, 0.0, 0
    for group in setup.groups:
        nbytes = chainermn_gradient_bytes(setup, group)
        reduced += 2 * _ring(setup, nbytes, speeds)
        updated += elements(group) * update_bytes(setup, group)
        packed += 0 if setup.on_host else 2 * (gradient_bytes(group) + nbytes)
    pack, update = packed / speeds.memory, updated / speeds.memory
    return _table(pack=pack, reduce=reduced, gather_gradients=0.0, update=update, all_gather=0.0)


def _table(**parts: float) -> Table:
    return {**parts, "total": sum(parts.values())}


def update_bytes(setup: Setup, group: GroupLayout) -> int:
    """Bytes that the update of one element reads and writes at least.

    The gradient is read, states are read and written, and so is the parameter, or its fp32 master,
    of which the parameter is written as well.
    """
    master = setup.master_bytes(group)
    parameter = 2 * master + group.dtype.itemsize if master else 2 * group.dtype.itemsize
    return group.dtype.itemsize + parameter + 2 * setup.state_bytes(group)


def _ring(setup: Setup, nbytes: int, speeds: Speeds, rings: int = 1) -> float:
    """Rings, one after the other, for so many bytes together."""
    ranks = setup.ranks
    slowest = speeds.inside if ranks <= setup.ranks_per_node else min(speeds.inside, speeds.between)
    return (ranks - 1) * (rings * speeds.latency + nbytes / ranks / slowest)


def _hostwise(setup: Setup, nbytes: int, speeds: Speeds, gathers: int) -> float:
    """All-gathers, one after the other, of so many bytes together, each part once into a node."""
    ranks, here = setup.ranks, min(setup.ranks_per_node, setup.ranks)
    inside = (ranks - 1) / ranks * nbytes / speeds.inside
    between = (ranks - here) / ranks * nbytes / speeds.between
    return gathers * (ranks - 1) * speeds.latency + max(inside, between)


def _into_nodes(setup: Setup, nbytes: int, speeds: Speeds, gathers: int) -> float:
    """The same, where the ranks of a node share what enters: a meeting of these, and no more."""
    ranks, here = setup.ranks, min(setup.ranks_per_node, setup.ranks)
    messages = (here - 1).bit_length() + (ranks - here)
    return gathers * messages * speeds.latency + (ranks - here) / ranks * nbytes / speeds.between


def _pairwise(setup: Setup, group: GroupLayout, speeds: Speeds) -> float:
    """An exchange of a group's gradients in pairs, piece by piece."""
    nbytes = elements(group) * setup.sent_dtype(group).itemsize
    ranks, here = setup.ranks, min(setup.ranks_per_node, setup.ranks)
    inside = (ranks - 1) / ranks * nbytes / speeds.inside
    between = here * (ranks - here) / ranks * nbytes / speeds.between
    turns = math.ceil(gradient_bytes(group) / ranks / piece_bytes(setup))
    return turns * (ranks - 1) * speeds.latency + max(inside, between)

"""What a rank holds and what it sends, in bytes; beside it, ChainerMN's unsharded optimizer.

Every table has the names that the report prints. Not counted are activations, temporaries of a
backward pass or of a rule's own code, the tables of kernels (less than a thousandth of a
parameter's bytes where parameters have thousands of elements), what MPI, NCCL and CUDA take for
themselves, and less than 128 bytes by which a state is aligned.
"""

from __future__ import annotations

import collections
import dataclasses

from smorms3_dist.collectives.base import PIECE_BYTES, SMALLEST_PIECE_BYTES
from smorms3_dist.collectives.cuda_aware import DEVICE_PIECE_BYTES
from smorms3_dist.collectives.narrowing import GATHERED_BYTES
from smorms3_dist.collectives.through_host import CHUNK_BYTES
from smorms3_dist.layout import GroupLayout
from smorms3_dist.plan.setup import Setup, elements, gradient_bytes

import numpy as np

MAX_RANKS = 1 << 16
"""The largest world size that is planned for."""

Table = dict[str, int]
"""Bytes by what they are for, and the ``total``."""


def memory(setup: Setup, rank: int | None = None) -> Table:
    """What a rank, by default one that holds most, holds during a step, where its parameters are.

    Of ``parameters`` that the ranks of a node share it is a rank's part. ``mean_gradients`` are
    those that hooks see: whole, or the shard's. ``in_flight`` is what double buffering holds beside
    the training: a rank's gradients, and the mean of its shard's. ``host_buffers`` are in host
    memory, beside a GPU; they are not in the total.
    """
    shards = [(setup.shard_sizes(group), _of_shard(setup, group)) for group in setup.groups]
    if rank is None:
        rank = int(np.argmax(sum(sizes * sum(each.values()) for sizes, each in shards)))
    flat = sum(group.size * group.dtype.itemsize for group in setup.groups)
    buffers, host_buffers = _buffers(setup)
    mean_gradients = flat if setup.replicated else 0
    return _memory(
        parameters=-(-flat // setup.ranks_sharing),
        gradients=_gradients(setup),
        mean_gradients=mean_gradients + _sum(shards, "mean_gradients", rank),
        in_flight=(flat if setup.double_buffering else 0) + _sum(shards, "in_flight", rank),
        buffers=buffers,
        masters=_sum(shards, "masters", rank),
        states=_sum(shards, "states", rank),
        host_buffers=host_buffers,
    )


def _memory(host_buffers: int = 0, **there: int) -> Table:
    return {**there, "host_buffers": host_buffers, "total": sum(there.values())}


def _sum(shards: list[tuple[np.ndarray, Table]], what: str, rank: int) -> int:
    return sum(int(sizes[rank]) * each[what] for sizes, each in shards)


def _of_shard(setup: Setup, group: GroupLayout) -> Table:
    """Bytes that an element of a shard takes."""
    masters, itemsize = setup.master_bytes(group), group.dtype.itemsize
    staged = 0
    if masters and (setup.hooks or setup.replicated):
        # While rules see it, the mean gradient of masters is there a second time, in their dtype.
        staged = itemsize + masters
    elif setup.hooks and not setup.replicated:
        staged = itemsize
    return {
        "mean_gradients": staged,
        "in_flight": itemsize if setup.double_buffering else 0,
        "masters": masters,
        "states": setup.state_bytes(group),
    }


def _gradients(setup: Setup) -> int:
    return sum(gradient_bytes(group) for group in setup.groups)


def _buffers(setup: Setup) -> tuple[int, int]:
    """What communication takes: where the parameters are, and in host memory beside a GPU."""
    if setup.transport == "nccl":
        return _buckets(setup), 0
    dtypes = [group.dtype for group in setup.groups]
    limit = piece_bytes(setup)
    exchanges = sum(_exchange(setup, limit, g.dtype, setup.sent_dtype(g)) for g in setup.groups)
    pieces = sum(limit // dtype.itemsize * dtype.itemsize for dtype in dtypes)
    if setup.transport == "cuda-aware":
        # The sum is formed in one array more.
        return exchanges + pieces, 0
    if setup.transport == "host":
        gathered = [
            min(GATHERED_BYTES, group.size * setup.gathered_dtype(group).itemsize)
            for group in setup.groups
            if setup.gathered_dtype(group) != group.dtype
        ]
        return exchanges + max(gathered, default=0), 0
    # Staged: two means on their way to the GPU, and what goes to each rank on its way from there,
    # which is packed on the GPU and copied to three buffers.
    if setup.ranks == 1:
        return 2 * pieces, 0
    flat = max(group.size * group.dtype.itemsize for group in setup.groups)
    on_host = 3 * min(CHUNK_BYTES, flat) + (2 + 3 * setup.ranks) * pieces + exchanges
    return (2 + setup.ranks) * pieces, on_host


def piece_bytes(setup: Setup) -> int:
    """The largest piece that is reduced at once, where gradients go over MPI."""
    peers = max(setup.ranks - 1, 1)
    if setup.transport == "cuda-aware":
        return DEVICE_PIECE_BYTES // peers
    return max(PIECE_BYTES // peers, SMALLEST_PIECE_BYTES)


def _exchange(setup: Setup, limit: int, dtype: np.dtype, sent: np.dtype | None = None) -> int:
    """`smorms3_dist.collectives.mpi.Exchange` and its `Reducer`: two turns, sent and received."""
    sent = sent or dtype
    summed = 4 + 2 if dtype == np.float16 else dtype.itemsize * (1 if sent == dtype else 2)
    return limit // dtype.itemsize * (4 * setup.ranks * sent.itemsize + summed)


def _buckets(setup: Setup) -> int:
    """`smorms3_dist.collectives.nccl`: two buckets, and a part of one to widen what was sent.

    A single rank packs gradients where somebody wants to see them, or they are rounded.
    """
    packed: collections.Counter[tuple[np.dtype, int]] = collections.Counter()
    received = 0
    seen = setup.ranks > 1 or setup.hooks or setup.replicated or setup.double_buffering
    for group in setup.groups:
        sent = setup.sent_dtype(group)
        if not seen and sent == group.dtype:
            continue
        # Memory for both is taken as for the first, though the second may be smaller.
        part = max((bucket.part_size for bucket in group.buckets), default=0)
        for turn, _ in enumerate(group.buckets[:2]):
            nbytes = part * setup.ranks * sent.itemsize
            packed[sent, turn] = max(packed[sent, turn], nbytes)
        if sent != group.dtype:
            received += part * group.dtype.itemsize
    return packed.total() + received


def sent(setup: Setup, rank: int | None = None) -> Table:
    """What a rank, by default one that sends most, sends in a step: `Collectives.bytes_sent`.

    Norms of hooks are not counted: a few numbers a parameter; in float16, on two ranks, the smaller
    part of one gradient as well.
    """
    # Gradients of all shards but the own one, which so is the smallest.
    shards = np.zeros(setup.ranks, np.int64)
    for group in setup.groups:
        shards += setup.shard_sizes(group) * setup.sent_dtype(group).itemsize
    own = shards.min() if rank is None else shards[rank]
    gradients = sum(g.size // setup.ranks * g.dtype.itemsize for g in setup.groups)
    gathered = sum(g.size // setup.ranks * setup.gathered_dtype(g).itemsize for g in setup.groups)
    parts = {
        "reduce_scatter": int(shards.sum() - own),
        "gather_gradients": gradients * (setup.ranks - 1) if setup.replicated else 0,
        # Each part goes to each other rank, or to each other node once.
        "all_gather": gathered * (-(-setup.ranks // setup.ranks_sharing) - 1),
    }
    return {**parts, "total": sum(parts.values())}


def chainermn_memory(setup: Setup) -> Table:
    """What a rank holds with ChainerMN's own optimizer and communicator.

    The communicators are ``pure_nccl`` (two buffers of the gradients' size, and one of the
    parameters' that its broadcast leaves), ``flat`` and ``non_cuda_aware`` (two in float32, and
    host memory that is not counted), and ``naive`` (float16 is widened, parameter by parameter).
    """
    parameters = _gradients(setup)
    buffers = 2 * sum(chainermn_gradient_bytes(setup, group) for group in setup.groups)
    if setup.transport == "nccl":
        buffers += parameters
    elif setup.on_host:
        halves = [slot for g in setup.groups if g.dtype == np.float16 for slot in g.slots]
        buffers = max((4 * slot.size for slot in halves), default=0)
    return _memory(
        parameters=parameters,
        gradients=parameters,
        mean_gradients=0,
        buffers=buffers,
        masters=sum(4 * elements(g) * setup.has_fp32_masters(g) for g in setup.groups),
        states=sum(elements(g) * setup.state_bytes(g) for g in setup.groups),
    )


def chainermn_gradient_bytes(setup: Setup, group: GroupLayout) -> int:
    """Bytes of the gradients of a group as ChainerMN sends them."""
    if setup.transport == "nccl":
        itemsize = setup.sent_dtype(group).itemsize
    else:
        itemsize = max(group.dtype.itemsize, 4) if setup.on_host else 4
    return elements(group) * itemsize


def chainermn_sent(setup: Setup) -> Table:
    """What a rank sends in ChainerMN's all-reduce, in a ring: 2 (N-1)/N of the gradients."""
    nbytes = sum(chainermn_gradient_bytes(setup, group) for group in setup.groups)
    reduced = -(-2 * (setup.ranks - 1) * nbytes // setup.ranks)
    return {"all_reduce": reduced, "total": reduced}


def smallest_ranks(setup: Setup, limit: int) -> int | None:
    """The smallest world size whose ranks hold no more than so many bytes; up to `MAX_RANKS`.

    That of the setup does not count.
    """
    gradients = (2 if setup.double_buffering else 1) * _gradients(setup)
    # Of what the ranks of a node share, the more of them the less.
    parts = setup.ranks_per_node if setup.share_parameters else 1
    whole = gradients + _gradients(setup) // parts
    if whole > limit:
        return None
    divided = sum(elements(g) * sum(_of_shard(setup, g).values()) for g in setup.groups)
    for ranks in range(divided // (limit - whole + 1) + 1, MAX_RANKS + 1):
        tried = dataclasses.replace(setup, ranks=ranks)
        # Nothing holds less than this, which needs no shards.
        least = whole + _buffers(tried)[0] + divided // ranks
        if least <= limit and memory(tried)["total"] <= limit:
            return ranks
    return None

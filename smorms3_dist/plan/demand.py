"""What a rank holds and what it sends, in bytes; beside it, ChainerMN's unsharded optimizer.

Every formula names where in the package its memory is taken. Not counted are activations,
temporaries of a backward pass or of a rule's own code, the tables of kernels (less than a
thousandth of a parameter's bytes where parameters have thousands of elements), what MPI, NCCL and
CUDA take for themselves, and less than 128 bytes by which a state is aligned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from smorms3_dist.collectives.base import PIECE_BYTES, SMALLEST_PIECE_BYTES
from smorms3_dist.collectives.cuda_aware import DEVICE_PIECE_BYTES
from smorms3_dist.collectives.through_host import CHUNK_BYTES
from smorms3_dist.plan.setup import Group, Setup

import numpy as np

MAX_RANKS = 1 << 16
"""The largest world size that is planned for."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one rank: on its GPU, or in host memory if it is trained there.

    Attributes:
        parameters: The flat buffers, of which parameters are views.
        gradients: Those that a backward pass makes, one for each parameter.
        mean_gradients: Where hooks see mean gradients: whole, or those of the shard.
        buffers: For communication: buckets, or pieces.
        masters: The fp32 masters.
        states: The states of the optimizer.
        host_buffers: In host memory, beside a GPU; not in ``total``.
    """

    parameters: int
    gradients: int
    mean_gradients: int
    buffers: int
    masters: int
    states: int
    host_buffers: int = 0

    @property
    def total(self) -> int:
        """All of it in that memory."""
        everything = sum(dataclasses.astuple(self))
        return everything - self.host_buffers


def memory(setup: Setup, rank: int | None = None) -> Memory:
    """What a rank holds during a step.

    Args:
        setup: The model and how it is trained.
        rank: The rank; by default one that holds most.
    """
    if rank is None:
        rank = int(np.argmax(_of_shard_by_rank(setup)))
    flat = _total(setup, lambda g: setup.flat_size(g) * g.dtype.itemsize)
    shard = {g: int(setup.shard_sizes(g)[rank]) for g in setup.groups}
    on_device, on_host = _buffers(setup)
    return Memory(
        parameters=flat,
        gradients=_total(setup, lambda g: g.elements * g.dtype.itemsize),
        mean_gradients=_total(setup, lambda g: shard[g] * _staged_itemsize(setup, g))
        + (flat if setup.replicated else 0),
        buffers=on_device,
        masters=_total(setup, lambda g: 4 * shard[g] * setup.has_masters(g)),
        states=_total(setup, lambda g: shard[g] * setup.states * setup.state_itemsize(g)),
        host_buffers=on_host,
    )


def state_bytes(setup: Setup, rank: int) -> int:
    """States and masters of a rank: `smorms3_dist.ShardedOptimizer.state_bytes`."""
    held = memory(setup, rank)
    return held.masters + held.states


def _of_shard_by_rank(setup: Setup) -> np.ndarray:
    """Bytes that depend on the size of the shard, by rank."""
    bytes_by_rank = np.zeros(setup.ranks, np.int64)
    for group in setup.groups:
        bytes_by_rank += _of_shard_itemsize(setup, group) * setup.shard_sizes(group)
    return bytes_by_rank


def _of_shard_itemsize(setup: Setup, group: Group) -> int:
    states = setup.states * setup.state_itemsize(group)
    return states + 4 * setup.has_masters(group) + _staged_itemsize(setup, group)


def _staged_itemsize(setup: Setup, group: Group) -> int:
    """Bytes an element of the shard's mean gradient, kept by `sharding.staged_gradient`.

    That of masters is there a second time, in float32, while rules see it.
    """
    if setup.has_masters(group) and (setup.hooks or setup.replicated):
        return group.dtype.itemsize + 4
    return group.dtype.itemsize if setup.hooks and not setup.replicated else 0


def _buffers(setup: Setup) -> tuple[int, int]:
    """What communication takes: where the parameters are, and in host memory beside a GPU."""
    if setup.transport == "nccl":
        return _buckets(setup), 0
    dtypes = [group.dtype for group in setup.groups]
    limit = piece_bytes(setup)
    exchanges = sum(_exchange(setup, limit, dtype) for dtype in dtypes)
    if setup.transport == "cuda-aware":
        # The sum is formed in one array more.
        return exchanges + sum(_whole(limit, dtype) for dtype in dtypes), 0
    if setup.transport == "host":
        return exchanges, 0
    # Staged: two means on their way to the GPU, and what goes to each rank on its way from there,
    # which is packed on the GPU and copied to three buffers.
    peers = setup.ranks if setup.ranks > 1 else 0
    on_device = sum((2 + peers) * _whole(limit, dtype) for dtype in dtypes)
    if not peers:
        return on_device, 0
    chunks = 3 * max(min(CHUNK_BYTES, setup.flat_size(g) * g.dtype.itemsize) for g in setup.groups)
    pieces = sum((2 + 3 * peers) * _whole(limit, dtype) for dtype in dtypes)
    return on_device, chunks + pieces + exchanges


def piece_bytes(setup: Setup) -> int:
    """The largest piece that is reduced at once, where gradients go over MPI."""
    peers = max(setup.ranks - 1, 1)
    if setup.transport == "cuda-aware":
        return DEVICE_PIECE_BYTES // peers
    return max(PIECE_BYTES // peers, SMALLEST_PIECE_BYTES)


def _whole(limit: int, dtype: np.dtype) -> int:
    """Bytes of the whole elements within a limit of bytes."""
    return limit // dtype.itemsize * dtype.itemsize


def _exchange(setup: Setup, limit: int, dtype: np.dtype) -> int:
    """`smorms3_dist.collectives.mpi.Exchange` and its `Reducer`: two turns, sent and received."""
    elements = limit // dtype.itemsize
    summed = elements * (4 + 2) if dtype == np.float16 else elements * dtype.itemsize
    return 4 * setup.ranks * elements * dtype.itemsize + summed


def _buckets(setup: Setup) -> int:
    """`smorms3_dist.collectives.nccl`: two buckets, and a part of one to widen what was sent."""
    packed: dict[tuple[np.dtype, int], int] = {}
    received = 0
    for group in setup.groups:
        dtype, size = setup.sent_dtype(group), setup.bucket_size(group)
        for turn in range(min(setup.buckets(group), 2)):
            packed[dtype, turn] = max(packed.get((dtype, turn), 0), size * dtype.itemsize)
        if dtype != group.dtype:
            received += size // setup.ranks * group.dtype.itemsize
    return sum(packed.values()) + received


def chainermn_memory(setup: Setup) -> Memory:
    """What a rank holds with ChainerMN's own optimizer and communicator.

    The communicators are ``pure_nccl`` (two buffers of the gradients' size, and one of the
    parameters' that its broadcast leaves), ``flat`` and ``non_cuda_aware`` (two in float32, and
    host memory that is not counted), and ``naive`` (float16 is widened, parameter by parameter).
    """
    parameters = _total(setup, lambda g: g.elements * g.dtype.itemsize)
    sent = _total(setup, lambda g: g.elements * chainermn_sent_itemsize(setup, g))
    if setup.transport == "nccl":
        buffers = 2 * sent + parameters
    elif setup.transport == "host":
        buffers = max((4 * g.largest for g in setup.groups if g.dtype == np.float16), default=0)
    else:
        buffers = 2 * sent
    return Memory(
        parameters=parameters,
        gradients=parameters,
        mean_gradients=0,
        buffers=buffers,
        masters=_total(setup, lambda g: 4 * g.elements * setup.has_masters(g)),
        states=_total(setup, lambda g: g.elements * setup.states * setup.state_itemsize(g)),
    )


def chainermn_sent_itemsize(setup: Setup, group: Group) -> int:
    """Bytes of an element of a gradient as ChainerMN sends it."""
    if setup.transport == "nccl":
        return setup.sent_dtype(group).itemsize
    if setup.transport == "host":
        return max(group.dtype.itemsize, 4)
    return 4


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends to others in a step.

    Attributes:
        reduce_scatter: Of gradients.
        gather_gradients: Of whole mean gradients.
        all_gather: Of parameters.
    """

    reduce_scatter: int
    gather_gradients: int
    all_gather: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def sent(setup: Setup, rank: int) -> Sent:
    """What a rank sends in a step: `smorms3_dist.collectives.base.Collectives.bytes_sent`.

    Norms of hooks are not counted: a few numbers a parameter, and on two ranks the smaller part of
    one gradient.

    Args:
        setup: The model and how it is trained.
        rank: The rank.
    """

    def of_others(group: Group) -> int:
        sizes = setup.shard_sizes(group)
        return int(sizes.sum() - sizes[rank]) * setup.sent_dtype(group).itemsize

    def gathered(group: Group) -> int:
        part = setup.flat_size(group) // setup.ranks * group.dtype.itemsize
        return part * (setup.ranks - 1)

    return Sent(
        reduce_scatter=_total(setup, of_others),
        gather_gradients=_total(setup, gathered) if setup.replicated else 0,
        all_gather=_total(setup, gathered),
    )


def most_sent(setup: Setup) -> Sent:
    """What the rank sends that sends most: the one with the smallest shard."""
    own = sum(setup.shard_sizes(g) * setup.sent_dtype(g).itemsize for g in setup.groups)
    return sent(setup, int(np.argmin(own)))


def chainermn_sent(setup: Setup) -> int:
    """What a rank sends in ChainerMN's all-reduce, in a ring: 2 (N-1)/N of the gradients."""
    nbytes = _total(setup, lambda g: g.elements * chainermn_sent_itemsize(setup, g))
    return -(-2 * (setup.ranks - 1) * nbytes // setup.ranks)


def smallest_ranks(setup: Setup, limit: int) -> int | None:
    """The smallest world size whose ranks hold no more than so many bytes.

    Args:
        setup: The model and how it is trained; its world size does not count.
        limit: Bytes.

    Returns:
        It, or ``None`` if there is none up to `MAX_RANKS`.
    """
    gradients = _total(setup, lambda g: g.elements * g.dtype.itemsize)
    if 2 * gradients > limit:
        return None
    divided = _total(setup, lambda g: g.elements * _of_shard_itemsize(setup, g))
    for ranks in range(1, MAX_RANKS + 1):
        tried = dataclasses.replace(setup, ranks=ranks)
        # Nothing holds less than this, which needs no shards.
        least = 2 * gradients + _buffers(tried)[0] + divided // ranks
        if least <= limit and memory(tried).total <= limit:
            return ranks
    return None


def _total(setup: Setup, of_group: Callable[[Group], int]) -> int:
    return sum(of_group(group) for group in setup.groups)

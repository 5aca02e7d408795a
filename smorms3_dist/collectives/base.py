"""The protocol of the collectives that a sharded step needs, and the arithmetic that they share.

A reduce-scatter hands its result over piece by piece: while one piece is in flight, the piece
before it is consumed (used for an update, or stored) out of the cache. No rank ever holds a second
array of the gradients' size, and a gradient is sent from where it lies if the piece covers one
contiguous range of it.

The sum of a piece is always formed in the order of the ranks, whoever owns it and whenever its
parts arrive: results depend on the gradients and the world size alone.
"""

from __future__ import annotations

import abc
import collections
import functools
import itertools
import operator
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from smorms3_dist.collectives.between_hosts import Hosts
from smorms3_dist.device.memory import RECEIVED, HostMemory
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.narrow import widen
from smorms3_dist.layout import Bucket, GroupLayout, Piece
from smorms3_dist.phases import Phases
from smorms3_dist.waiting import Wait

import numpy as np

PIECE_BYTES = 2 * 1024 * 1024
"""What a rank has in flight of one piece, summed over its peers. Small enough to stay in the
caches, large enough that handing a piece over costs little beside its bytes: with many ranks that
is some 100 microseconds, six messages and more, for each piece of a shard that is small."""

SMALLEST_PIECE_BYTES = 16 * 1024
"""Below this, the cost of a message outweighs its bytes."""


LEFT = 1 << 57
"""The bit that a rank sets in `Collectives.exchange_word` when its script has ended."""

_WAITS = {
    "exchange_word": "in the exchange of all ranks before it",
    "exchange_note": "in the exchange of all ranks before it",
    "reduce_scatter": "in the reduction of gradients",
    "all_gather": "in the gathering of what each rank has",
    "broadcast": "in a broadcast",
    "enter_hosts": "in the gathering of what each rank has",
    "broadcast_to_hosts": "in a broadcast",
    "meet_on_host": "in the meeting of the ranks of its host",
    "all_reduce_or": "in an exchange of flags",
    "all_gather_object": "in an exchange of facts",
    "all_reduce_sum": "in a sum over all ranks",
}
"""What a rank waits in, by method."""


class Gradients(Protocol):
    """A rank's gradients of a group, to be sent in whichever portions suit the transport.

    Attributes:
        dtype: Of the pieces: that of the group, or a narrow one, in which they are sent.
    """

    @property
    def dtype(self) -> np.dtype: ...  # noqa: D102

    def read_piece(self, owner: int, piece: Piece, scratch: np.ndarray) -> np.ndarray:
        """Gives the gradients of a piece of the owner's shard as a contiguous array.

        That is a view where it can be, else ``scratch``, of the piece's size, packed; gaps are
        zeros. The pieces of one owner are read in their order, each once.
        """

    def pack_bucket(self, bucket: Bucket, out: np.ndarray, scale: float) -> None:
        """Writes the gradients of a bucket into an array of its size; gaps become zeros.

        They are scaled before they are rounded to the dtype of ``out``.
        """


Consume = Callable[[Piece, Mean], None]
"""``consume(piece, mean)``: takes the mean of one piece of this rank's own shard, whose arrays are
valid during the call and must not be written to."""


def _noted(method: Callable[..., Any], at: str) -> Callable[..., Any]:
    """A method that notes that the rank waits in it, unless another one has."""

    @functools.wraps(method)
    def noted(self: Collectives, *args: Any, **kwds: Any) -> Any:
        wait = self.wait
        if wait.at is not None:
            return method(self, *args, **kwds)
        wait.since = time.monotonic()
        wait.at = at
        try:
            return method(self, *args, **kwds)
        finally:
            wait.at = None

    return noted


Order = Sequence[Sequence[Piece]]
"""The pieces of each rank's shard, by rank, in the order in which they are reduced."""


class ReduceScatter(Protocol):
    """What has `smorms3_dist.collectives.base.Collectives.reduce_scatter`."""

    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        """Averages the gradients of a group; each rank consumes its own shard. Collective."""


Work = Callable[[ReduceScatter], None]


class SideChannel(abc.ABC):
    """Goes on with one piece of work at a time, while the ranks do other things together."""

    @abc.abstractmethod
    def start(self, work: Work) -> None:
        """Begins, when what was begun before has been finished; on all ranks alike."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Waits until it is done, if there is anything.

        Raises:
            RuntimeError: If it has failed, naming the rank, and why.
        """


class AbandonedError(Exception):
    """Ends work that has been given up."""


class EarlyReduceScatter(Protocol):
    """A `ReduceScatter` of gradients that are still to come, in an order of their own.

    Attributes:
        has_thread: Whether it has a thread, which waits for gradients, and for other ranks. Else
            who brings gradients calls `progress`, and a rank that has begun may be held up until
            the others have.
        pause_s: How often `progress` is to be called by a thread that waits for gradients, in
            seconds; ``None`` if it need not be.
    """

    has_thread: bool
    pause_s: float | None

    def reduce_in_order(
        self, group: GroupLayout, gradients: Gradients, consume: Consume, order: Order
    ) -> Iterable[Bucket]:
        """As `ReduceScatter.reduce_scatter`; the order is the same on all ranks.

        Returns:
            To be taken to its end. Without a thread it gives each bucket before it is packed: the
            next one is to be taken when the gradients of that are there.

        Raises:
            AbandonedError: If the channel is given up meanwhile.
        """

    def progress(self) -> None:
        """Lets what is under way go on, as far as it can.

        Raises:
            AbandonedError: If the channel has been given up, and has a thread.
        """


class EarlyChannel(EarlyReduceScatter, Protocol):
    """A side channel that can be given up: it holds up no rank that has not come there."""

    def prepare(self, group: GroupLayout, turns: Sequence[int]) -> Order:
        """Makes what a group needs, and gives the order in which its gradients are reduced.

        ``turns`` says of each slot when its gradient is final, in any numbers that grow.
        """

    def start_early(self, work: Callable[[EarlyReduceScatter], Iterator[None]]) -> None:
        """Begins, as `SideChannel.start`. A script that ends does not wait for it.

        What the work gives is taken to its end: each time that it gives something without a thread,
        it is gone on with by `progress`.
        """

    def hurry(self) -> None:
        """Notes that somebody waits for what comes."""

    def finish(self) -> None:
        """See `SideChannel.finish`."""

    def abandon(self) -> None:
        """Gives the channel up, with all that is under way in it. Other ranks do so, too."""


class GatherChannel(Protocol):
    """A side channel for parameters, which goes on with what `start_gather` was given.

    Attributes:
        rank: This rank.
        size: World size.
    """

    rank: int
    size: int

    def start_gather(self, work: Callable[[GatherChannel], None]) -> None:
        """Begins, when what was begun before has been finished; on all ranks alike."""

    def all_gather(self, flat: np.ndarray, buckets: Sequence[Bucket]) -> None:
        """As `Collectives.all_gather`, within ``work``."""

    def gather_in_turn(self, buckets: Iterable[tuple[np.ndarray, Bucket]]) -> Iterator[None]:
        """Gathers buckets of flat buffers one after the other; gives something after each."""

    def hurry(self) -> None:
        """Notes that somebody waits for what comes."""

    def stop_hurrying(self) -> None:
        """Notes that nobody does any more."""

    def finish(self) -> None:
        """See `SideChannel.finish`."""


class AtOnce(SideChannel):
    """Does what it is given before it returns."""

    def __init__(self, collectives: Collectives) -> None:
        self._collectives = collectives

    def start(self, work: Work) -> None:
        """See `SideChannel.start`."""
        work(self._collectives)

    def finish(self) -> None:
        """See `SideChannel.finish`: there is nothing."""


class Collectives(abc.ABC):
    """What the ranks of a job do together.

    Every method except the constructor is collective: all ranks call it in the same order with
    arguments that agree.

    Attributes:
        rank: This rank.
        size: World size.
        bytes_sent: Bytes that this rank has sent to its peers so far, by operation
            (``reduce_scatter``, ``all_gather``, ``broadcast``).
        on_devices: Those of the same ranks on the memory of GPUs, as `on_memory` has made them.
        shared: What all collectives over the same communicator share, whatever number of optimizers
            uses it, by the owner's own keys.
        wait: What this rank is waiting for. Every method that waits notes it there.
    """

    def __init_subclass__(cls) -> None:
        for name, at in _WAITS.items():
            if name in vars(cls):
                setattr(cls, name, _noted(vars(cls)[name], at))

    def __init__(self, rank: int, size: int, wait: Wait | None = None) -> None:
        self.rank = rank
        self.size = size
        self.wait = Wait(rank) if wait is None else wait
        self._users = itertools.count(1)
        self.bytes_sent: collections.Counter[str] = collections.Counter()
        self.on_devices: dict[Any, Collectives] = {}
        self.shared: dict[Any, Any] = {}
        self._piece_cuts: weakref.WeakKeyDictionary[GroupLayout, tuple[tuple[Piece, ...], ...]] = (
            weakref.WeakKeyDictionary()
        )

    @property
    def phases(self) -> Phases:
        """Where the time of this rank goes."""
        return self.wait.phases

    def prepare(self, group: GroupLayout) -> None:
        """Allocates large buffers, so that a lack of memory is known before anything is changed.

        Not collective: it may fail by a MemoryError on one rank alone.
        """
        return

    def check_side_channel(self) -> None:
        """Makes sure that `open_side_channel` can be called. Not collective.

        Raises:
            RuntimeError: If it cannot, saying why and what to do.
        """
        return

    def open_side_channel(self) -> SideChannel:
        """Makes another channel between the same ranks, for what they reduce meanwhile. Collective.

        Where the transport has no such thing, what it is given is done at once.
        """
        return AtOnce(self)

    def why_not_beside(self) -> str | None:
        """Why `open_early_channel` cannot be called, in words, if so. Not collective."""
        return "no second thread can use the transport"

    def open_early_channel(self) -> EarlyChannel:
        """Makes a side channel for gradients that come during a backward pass. Collective."""
        raise NotImplementedError(self.why_not_beside())

    def why_no_gather_channel(self) -> str | None:
        """Why `open_gather_channel` cannot be called, in words, if so. Not collective."""
        return self.why_not_beside()

    def open_gather_channel(self) -> GatherChannel:
        """Makes a side channel for parameters that are gathered meanwhile. Collective."""
        raise NotImplementedError(self.why_no_gather_channel())

    def why_not_shared(self) -> str | None:
        """Why ranks of a host cannot share arrays, in words, if so. Not collective."""
        return "the communicator is not MPI's own"

    @property
    def hosts(self) -> Hosts:
        """Which ranks share memory, where they can; to be asked first by all of them together."""
        raise NotImplementedError(self.why_not_shared())

    def enter_hosts(self, flat: np.ndarray, buckets: Sequence[Bucket]) -> None:
        """Receives what `Hosts.entering` own of a flat buffer, and sends what this rank owns.

        So each part enters each other host once.
        """
        raise NotImplementedError(self.why_not_shared())

    def broadcast_to_hosts(self, array: np.ndarray) -> None:
        """As `broadcast` from rank 0, to the first rank of each host alone."""
        raise NotImplementedError(self.why_not_shared())

    def meet_on_host(self) -> None:
        """Waits until all ranks of this rank's host have come here, and what they have written."""
        raise NotImplementedError(self.why_not_shared())

    def count_user(self) -> int:
        """Counts those who use the communicator: the same number on all ranks that do alike."""
        return next(self._users)

    @abc.abstractmethod
    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        """Averages the gradients of a group over the ranks; each rank receives its own shard.

        ``consume`` takes the mean of each piece of it, in order.
        """

    @abc.abstractmethod
    def all_gather(self, flat: np.ndarray, buckets: Sequence[Bucket]) -> None:
        """Gives every rank the parts that the others own of a group's flat buffer, in place."""

    @abc.abstractmethod
    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """Overwrites a contiguous array with that of ``root``."""

    def all_reduce_or(self, flags: int) -> int:
        """Returns the bitwise or of the flags of all ranks (a non-negative integer below 2**63)."""
        return functools.reduce(operator.or_, self.all_gather_object(flags))

    @abc.abstractmethod
    def all_gather_object(self, value: Any) -> list[Any]:
        """Returns the (small, picklable) values of all ranks, by rank."""

    def await_device(self, mark: Any = None) -> None:
        """Lets the host wait until a GPU comes to a mark of `Memory.mark`; not collective.

        For who is about to read what comes after collectives there: CUDA itself would wait for ever
        for a rank that does not come to them.

        Args:
            mark: By default all that the current stream has been given.

        Raises:
            RuntimeError: If the GPU or a collective fails, or it does not come there in time.
        """
        return

    def exchange_word(self, word: int) -> int:
        """Returns the bitwise or of a word of all ranks, as `all_reduce_or`.

        Words do not mix with what is exchanged otherwise. Where the transport can do it, a rank
        whose script has ended takes part in one more exchange, with `LEFT`.
        """
        return self.all_reduce_or(word)

    def exchange_note(self, note: Any) -> list[Any]:
        """Returns the notes of all ranks, by rank, after they have exchanged words."""
        return self.all_gather_object(note)

    def _count_reduce_scatter(self, group: GroupLayout, itemsize: int | None = None) -> None:
        """Counts everything but the own shard, which goes to its owners once.

        ``itemsize`` is of an element as it is sent, by default as it is.
        """
        own = group.shards[self.rank].size
        elements = sum(shard.size for shard in group.shards) - own
        self.bytes_sent["reduce_scatter"] += elements * (itemsize or group.dtype.itemsize)

    def piece_limit(self, dtype: np.dtype) -> int:
        """Elements of the largest piece, the same on all ranks."""
        share = PIECE_BYTES // max(self.size - 1, 1)
        return max(share, SMALLEST_PIECE_BYTES) // dtype.itemsize

    def pieces(self, group: GroupLayout) -> tuple[tuple[Piece, ...], ...]:
        """The pieces of every rank's shard, by rank; computed once for a layout."""
        cuts = self._piece_cuts.get(group)
        if cuts is None:
            limit = self.piece_limit(group.dtype)
            cuts = tuple(shard.pieces(limit, inner_whole=True) for shard in group.shards)
            self._piece_cuts[group] = cuts
        return cuts


class DeviceCollectives(Collectives):
    """Collectives on device memory, whose flags and objects go over those on host memory."""

    def __init__(self, host: Collectives) -> None:
        super().__init__(host.rank, host.size, host.wait)
        self._host = host

    def why_not_beside(self) -> str | None:
        """See `Collectives.why_not_beside`."""
        return "gradients on GPUs do not go over NCCL"

    def why_no_gather_channel(self) -> str | None:
        """See `Collectives.why_no_gather_channel`."""
        return "parameters on GPUs do not go over NCCL"

    def all_reduce_or(self, flags: int) -> int:
        """See `Collectives.all_reduce_or`."""
        return self._host.all_reduce_or(flags)

    def all_gather_object(self, value: Any) -> list[Any]:
        """See `Collectives.all_gather_object`."""
        return self._host.all_gather_object(value)

    def exchange_word(self, word: int) -> int:
        """See `Collectives.exchange_word`."""
        return self._host.exchange_word(word)

    def exchange_note(self, note: Any) -> list[Any]:
        """See `Collectives.exchange_note`."""
        return self._host.exchange_note(note)

    def all_reduce_sum(self, numbers: Any) -> None:
        """Sums a few numbers on the device over the ranks, in their order and in place."""
        everybodys = self.all_gather_object(numbers.get())
        with np.errstate(all="ignore"):
            numbers.set(np.asarray(sum(everybodys)))


def empty_on_host(size: int, dtype: np.dtype) -> np.ndarray:
    """Makes an array in host memory, without values, for gradients that come from other ranks."""
    return HostMemory().empty(size, dtype, "gradients on their way between ranks", RECEIVED)


class Reducer:
    """Sums a piece over the ranks, in their order, with memory for one piece.

    The mean is the sum times 1/size, as ChainerMN's naive communicator has it. float16 is summed
    and scaled in float32 before it is rounded once, so that a mean in range never overflows on the
    way. The largest piece has ``limit`` elements; ``empty(size, dtype)`` allocates arrays. What is
    ``sent`` in a narrow dtype is summed in ``dtype``, float32 or float64.
    """

    def __init__(
        self,
        dtype: np.dtype,
        size: int,
        limit: int,
        empty: Callable[..., Any] = empty_on_host,
        sent: np.dtype | None = None,
    ) -> None:
        self._dtype = dtype
        self._is_narrow = sent not in (None, dtype)
        self._sum_dtype = np.dtype(np.float32) if dtype == np.float16 else dtype
        self._scale = self._sum_dtype.type(1.0 / size)
        self._sum = empty(limit, self._sum_dtype)
        self._rounded = empty(limit if self._sum_dtype != dtype else 0, dtype)
        self._wide = empty(limit if self._is_narrow else 0, dtype)

    def __call__(self, contributions: Sequence[np.ndarray]) -> Mean:
        """Sums one piece of each rank, by rank; the mean is valid until the next call."""
        if self._is_narrow:
            return self._mean_of_narrow(contributions)
        first, *others = contributions
        if not others:
            return Mean(first)
        if self._sum_dtype != self._dtype:
            return self._mean_of_float16(contributions)
        with np.errstate(all="ignore"):
            for other in others[:-1]:
                first = np.add(first, other, out=self._sum[: other.size])
        return Mean(first, others[-1], float(self._scale))

    def _mean_of_narrow(self, contributions: Sequence[np.ndarray]) -> Mean:
        *others, last = contributions
        total, wide = self._sum[: last.size], self._wide[: last.size]
        for turn, other in enumerate(others):
            widen(other, wide if turn else total)
            if turn:
                with np.errstate(all="ignore"):
                    np.add(total, wide, out=total)
        widen(last, wide)
        return Mean(total, wide, float(self._scale)) if others else Mean(wide)

    def _mean_of_float16(self, contributions: Sequence[np.ndarray]) -> Mean:
        size = contributions[0].size
        total, rounded = self._sum[:size], self._rounded[:size]
        with np.errstate(all="ignore"):
            total[...] = contributions[0]
            for contribution in contributions[1:]:
                np.add(total, contribution, out=total)
            np.multiply(total, self._scale, out=rounded, casting="same_kind")
        return Mean(rounded)

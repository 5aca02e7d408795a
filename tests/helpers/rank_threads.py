"""Collectives between ranks that are threads of one process, for tests.

They take the same path as real ranks do (the same pieces, the same order of sums, the same counts
of bytes) without processes or an MPI library, so that many world sizes can be tested in little
time.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from smorms3_dist.collectives.base import (
    LEFT,
    AbandonedError,
    Collectives,
    Consume,
    EarlyChannel,
    GatherChannel,
    Gradients,
    Order,
    Reducer,
    SideChannel,
)
from smorms3_dist.collectives.beside import InThread
from smorms3_dist.collectives.between_hosts import Hosts
from smorms3_dist.layout import Bucket, GroupLayout
from smorms3_dist.waiting import Watch, stall_warning

import numpy as np

_Result = TypeVar("_Result")

if sys.version_info < (3, 13):
    # CPython counts the depth of the tree that it makes for all threads together, and raises a
    # SystemError where two of them make one at once, as ranks do that read headers of arrays.
    _parse, _one_at_a_time = ast.parse, threading.RLock()

    def _parse_alone(*arguments: Any, **how: Any) -> Any:
        with _one_at_a_time:
            return _parse(*arguments, **how)

    ast.parse = _parse_alone


def run_ranks(
    size: int, function: Callable[[ThreadCollectives], _Result], timeout: float = 60.0
) -> list[_Result]:
    """Runs a function on every rank of a world of threads; returns what it returned, by rank.

    A rank fails that waits for the others for ``timeout`` seconds. What the first failing rank
    raised is raised; the other ranks are released, not left waiting.
    """
    meeting, words = Meeting(size, timeout), Meeting(size, timeout)
    ranks = [ThreadCollectives(rank, meeting, words) for rank in range(size)]
    results: list[Any] = [None] * size
    failures: list[tuple[int, BaseException]] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(ranks[rank])
            ranks[rank].leave()
            # They know their host's: page-locked memory would stay until Python looks for cycles.
            ranks[rank].on_devices.clear()
        except BaseException as failure:
            failures.append((rank, failure))
            meeting.barrier.abort()
            words.barrier.abort()

    limit = stall_warning()
    watch = None if math.isinf(limit) else Watch([rank.wait for rank in ranks], limit)
    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if watch is not None:
        watch.stop()
    # Ranks that were waiting for the failed one report a broken barrier; the cause is what matters.
    failures.sort(key=lambda item: isinstance(item[1], threading.BrokenBarrierError))
    if failures:
        raise failures[0][1]
    return results


class Meeting:
    """What the ranks of one world share: a place for each to show something, and a barrier."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size = size
        self.timeout = timeout
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.shown: list[Any] = [None] * size

    def exchange(self, rank: int, value: Any, timeout: float | None = None) -> list[Any]:
        """Gives the values of all ranks, each of which waits for so many seconds at most."""
        self.shown[rank] = value
        self.barrier.wait(timeout)
        shown = list(self.shown)
        self.barrier.wait(timeout)
        return shown


class ThreadCollectives(Collectives):
    """The collectives of one thread; see `run_ranks`.

    Attributes:
        has_side_channel: Whether threads of their own reduce what ranks reduce meanwhile.
        obstacle: Why gradients cannot be reduced during the backward pass, if so.
        host_of: The host of each rank; by default all are on one.
    """

    has_side_channel = False
    obstacle: str | None = None
    host_of: Sequence[int] = ()

    def __init__(self, rank: int, meeting: Meeting, words: Meeting | None = None) -> None:
        super().__init__(rank, meeting.size)
        self._meeting = meeting
        self._words = words or meeting
        self._is_over = False

    def _show(self, value: Any) -> list[Any]:
        """Shows a value to all ranks, and gives theirs, valid until `_leave`."""
        self._meeting.shown[self.rank] = value
        self._meeting.barrier.wait()
        return list(self._meeting.shown)

    def _leave(self) -> None:
        self._meeting.barrier.wait()

    def open_side_channel(self) -> SideChannel:
        """See `Collectives.open_side_channel`."""
        if not self.has_side_channel:
            return super().open_side_channel()
        meetings = self._meeting.exchange(self.rank, Meeting(self.size, self._meeting.timeout))
        return ThreadSideChannel(self, meetings[0])

    def why_not_beside(self) -> str | None:
        """See `Collectives.why_not_beside`."""
        return self.obstacle

    def open_early_channel(self) -> EarlyChannel:
        """See `Collectives.open_early_channel`."""
        meetings = self._meeting.exchange(self.rank, Meeting(self.size, self._meeting.timeout))
        return ThreadSideChannel(self, meetings[0])

    def open_gather_channel(self) -> GatherChannel:
        """See `Collectives.open_gather_channel`."""
        meetings = self._meeting.exchange(self.rank, Meeting(self.size, self._meeting.timeout))
        return ThreadSideChannel(self, meetings[0])

    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        self.reduce_in_order(group, gradients, consume, self.pieces(group))

    def reduce_in_order(
        self, group: GroupLayout, gradients: Gradients, consume: Consume, pieces: Order
    ) -> None:
        """As `reduce_scatter`, with the pieces in an order of their own."""
        limit = self.piece_limit(group.dtype)
        reduce = Reducer(group.dtype, self.size, limit, sent=gradients.dtype)
        packed = np.empty((self.size, limit), gradients.dtype)
        everybodys = self._show(gradients)
        for piece in pieces[self.rank]:
            contributions = [
                theirs.read_piece(self.rank, piece, packed[rank, : piece.size])
                for rank, theirs in enumerate(everybodys)
            ]
            consume(piece, reduce(contributions))
        self._leave()
        self._count_reduce_scatter(group, gradients.dtype.itemsize)

    def all_gather(self, flat: np.ndarray, buckets: Sequence[Bucket]) -> None:
        others = self._show(flat)
        for bucket in buckets:
            for rank, other in enumerate(others):
                if rank != self.rank:
                    part_f = bucket.part_of(rank)
                    flat[part_f] = other[part_f]
                    self.bytes_sent["all_gather"] += bucket.part_size * flat.itemsize
        self._leave()

    @property
    def hosts(self) -> Hosts:
        """See `Collectives.hosts`."""
        return Hosts(self.host_of or [0] * self.size, self.rank)

    def why_not_shared(self) -> str | None:
        """See `Collectives.why_not_shared`."""
        return None

    def enter_hosts(self, flat: np.ndarray, buckets: Sequence[Bucket]) -> None:
        """See `Collectives.enter_hosts`."""
        if self.hosts.are_one:
            return
        everybodys = self._show(flat)
        for bucket in buckets:
            for rank in self.hosts.entering:
                part_f = bucket.part_of(rank)
                flat[part_f] = everybodys[rank][part_f]
            sent = bucket.part_size * flat.itemsize * len(self.hosts.entries)
            self.bytes_sent["all_gather"] += sent
        self._leave()

    def broadcast_to_hosts(self, array: np.ndarray) -> None:
        """See `Collectives.broadcast_to_hosts`."""
        source = self._show(array)[0]
        if self.hosts.is_first and self.rank:
            array[...] = source
        self._leave()

    def meet_on_host(self) -> None:
        """See `Collectives.meet_on_host`."""
        self._meeting.barrier.wait()

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        source = self._show(array)[root]
        if self.rank != root:
            array[...] = source
        else:
            self.bytes_sent["broadcast"] += array.nbytes * (self.size - 1)
        self._leave()

    def all_gather_object(self, value: Any) -> list[Any]:
        """See `Collectives.all_gather_object`."""
        return self._meeting.exchange(self.rank, value)

    def exchange_word(self, word: int) -> int:
        """See `Collectives.exchange_word`."""
        word = functools.reduce(operator.or_, self._words.exchange(self.rank, word))
        self._is_over = self._is_over or bool(word & LEFT)
        return word

    def exchange_note(self, note: Any) -> list[Any]:
        """See `Collectives.exchange_note`."""
        return self._words.exchange(self.rank, note)

    def leave(self) -> None:
        """Tells the others that this rank has ended, as soon as they ask; waits until then."""
        if not self._is_over:
            everybodys = self._words.exchange(self.rank, LEFT, threading.TIMEOUT_MAX)
            if any(word != LEFT for word in everybodys):
                self._words.exchange(self.rank, self.wait.farewell)


class ThreadSideChannel(InThread):
    """Ranks of a meeting of their own, each in a second thread.

    Attributes:
        gate: Until it is set, nothing is reduced.
        fault: What a reduction fails by, if it is to.
        orders: Those in which gradients have been reduced during backward passes.
        before_bucket: Is called before each bucket of parameters that is gathered.
    """

    def __init__(self, host: ThreadCollectives, meeting: Meeting) -> None:
        super().__init__(host)
        self._ranks = ThreadCollectives(host.rank, meeting)
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.orders: list[Order] = []
        self._host = host
        self.before_bucket: Callable[[], None] = lambda: None

    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        """See `InThread.reduce_scatter`."""
        assert self.gate.wait(60)
        if self.fault is not None:
            raise self.fault
        self._ranks.reduce_scatter(group, gradients, consume)

    def reduce_in_order(
        self, group: GroupLayout, gradients: Gradients, consume: Consume, order: Order
    ) -> Iterable[Bucket]:
        """See `InThread.reduce_in_order`."""
        assert self.gate.wait(60)
        if self.fault is not None:
            self._ranks._meeting.barrier.abort()
            raise self.fault
        self.orders.append(order)
        self._ranks.reduce_in_order(group, gradients, consume, order)
        self._host._count_reduce_scatter(group, gradients.dtype.itemsize)
        return ()

    def gather_in_turn(self, buckets: Iterable[tuple[np.ndarray, Bucket]]) -> Iterator[None]:
        """See `InThread.gather_in_turn`."""
        for flat, bucket in buckets:
            self.before_bucket()
            self._ranks.all_gather(flat, [bucket])
            yield

    def progress(self) -> None:
        """See `InThread.progress`."""
        if self.is_abandoned:
            raise AbandonedError

    def abandon(self) -> None:
        """See `InThread.abandon`."""
        super().abandon()
        self._ranks._meeting.barrier.abort()

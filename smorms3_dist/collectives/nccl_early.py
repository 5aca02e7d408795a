"""Reduction over NCCL that begins during the backward pass, on a stream of its own.

Bucket by bucket: when all its gradients are there, that stream waits for the one on which they are
computed, packs the bucket, sums it up over the ranks, and stores this rank's part. No host waits.

What has begun on one GPU keeps a stream busy there until all ranks have begun it, and a device that
is waited for as a whole, as memory that is given back has it, waits for that stream, too. So there
is a communicator for this alone, which can be given up; and a rank that has no gradients to bring,
or whose script ends, begins as well, before it waits for others. All ranks begin in the order of
the host's program: nothing gets into the way of other collectives of NCCL in the backward pass.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from smorms3_dist.collectives.base import (
    Collectives,
    Consume,
    EarlyReduceScatter,
    Gradients,
    Order,
)
from smorms3_dist.collectives.beside import EARLY_REDUCTION, end_after_words, has_failed
from smorms3_dist.collectives.nccl_buckets import Buckets
from smorms3_dist.collectives.nccl_waiting import BoundedWait, NcclError, abort
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.layout import Bucket, GroupLayout

import numpy as np

PATIENCE_S = 1.0
"""So long a rank whose script has ended waits for the others to come to what is under way."""


class NcclEarlyChannel:
    """A `smorms3_dist.collectives.base.EarlyChannel`, without a thread.

    Args:
        collectives: The ranks.
        memory: Of the GPU.
        comm: A communicator of NCCL that nobody else uses.
        wait: Waits for what it does.
        communication_dtype: What gradients are sent as; ``None`` for their own dtype.
        count: Counts the bytes of a group's reduction.
    """

    has_thread = False
    pause_s: float | None = None

    def __init__(
        self,
        collectives: Collectives,
        memory: CudaMemory,
        comm: Any,
        wait: BoundedWait,
        communication_dtype: str | None,
        count: Callable[[GroupLayout], None],
    ) -> None:
        self._rank = collectives.rank
        self._size = collectives.size
        self._memory = memory
        self._comm = comm
        self._wait = wait
        self._count = count
        self._stream = memory.stream()
        self._buckets = Buckets(
            *(memory, self._rank, self._size, communication_dtype, self._allocate), turns=1
        )
        self._work: Iterator[None] = iter(())
        self._is_under_way = False
        self._error: BaseException | None = None
        # Of this step, and of the one before, until the host has waited for it.
        self._reduced: Any = None
        self._reduced_before: Any = None
        end_after_words(self)

    def prepare(self, group: GroupLayout, turns: Sequence[int]) -> Order:
        """See `EarlyChannel.prepare`. All ranks reduce a bucket at once."""
        self._buckets.prepare(group)

        def when(index: int) -> int:
            slots = group.slots_of_buckets[group.buckets[index]]
            return max((turns[slot.index] for slot in slots), default=0)

        # What the others own of a bucket is nothing to this rank.
        order: list[Sequence[Any]] = [()] * self._size
        indices = sorted(range(len(group.buckets)), key=when)
        order[self._rank] = [group.piece_of_bucket(self._rank, index) for index in indices]
        return order

    def start_early(self, work: Callable[[EarlyReduceScatter], Iterator[None]]) -> None:
        """See `EarlyChannel.start_early`."""
        self._reduced_before = self._reduced
        self._is_under_way = True
        self._work = work(self)

    def progress(self) -> None:
        """See `EarlyReduceScatter.progress`."""
        try:
            with self._memory.current():
                next(self._work, None)
        except BaseException as error:
            self._error = error
            raise

    def reduce_in_order(
        self, group: GroupLayout, gradients: Gradients, consume: Consume, order: Order
    ) -> Iterator[Bucket]:
        """See `EarlyReduceScatter.reduce_in_order`."""
        buckets, memory = self._buckets, self._memory
        starts_s = itertools.accumulate(bucket.part_size for bucket in group.buckets)
        at = dict(zip([0, *starts_s], group.buckets, strict=False))
        for piece in order[self._rank]:
            bucket = at[piece.start_s]
            yield bucket
            self._stream.wait_event(memory.event(memory.current_stream()))
            with self._stream:
                packed = buckets.memory_of(group, 0)[: bucket.size]
                gradients.pack_bucket(bucket, packed, buckets.scale_before(group))
                part = buckets.reduce(self._comm, bucket, packed, self._stream)
                consume(piece, buckets.mean(group, part))
            self._reduced = memory.event(self._stream)
        self._count(group)

    def hurry(self) -> None:
        """See `EarlyChannel.hurry`: the host waits for the reduction of the step before.

        Raises:
            NcclError: If the GPU or NCCL reports an error, or it does not end in time.
        """
        before, self._reduced_before = self._reduced_before, None
        if before is not None:
            self._wait.wait_for(before, self._comm)

    def finish(self) -> None:
        """See `SideChannel.finish`: it is streams that wait for the rest."""
        self._is_under_way = False
        error, self._error = self._error, None
        if error is not None:
            raise has_failed(self._rank, error, EARLY_REDUCTION)

    def abandon(self) -> None:
        """See `EarlyChannel.abandon`."""
        self._is_under_way = False
        self._work = iter(())
        abort(self._comm)

    def end(self) -> None:
        """Gives up what no update is going to make use of, if it does not come to its end now.

        The process could not end before its GPU has.
        """
        if self._is_under_way and self._reduced is not None:
            wait = BoundedWait(self._rank, self._memory, PATIENCE_S)
            # It says who has not come, of whom others have been told.
            with contextlib.suppress(NcclError):
                wait.wait_for(self._reduced, self._comm)
        self._is_under_way = False

    def _allocate(self, kind: str, which: int, size: int, dtype: np.dtype) -> Any:
        what = f"a bucket of gradients in {dtype}, of the backward pass ({kind})"
        return self._memory.zeros(size, dtype, what)

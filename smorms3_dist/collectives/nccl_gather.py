"""All-gathers over NCCL beside the next forward pass, on a stream of their own.

All buckets are launched within the update, in the order of the host's program, as all collectives
of NCCL are: no thread, and no host that waits. That stream first waits for the one of the update;
who reads parameters lets its own stream wait for an event after the last bucket that it needs.

There is a communicator for this alone, so that it can be given up. It is waited for, in bounded
time, before the next one begins, and before the script ends.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from smorms3_dist.collectives.base import Collectives, GatherChannel
from smorms3_dist.collectives.beside import GATHERING, end_after_words
from smorms3_dist.collectives.nccl_buckets import type_of
from smorms3_dist.collectives.nccl_waiting import BoundedWait, NcclError
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.layout import Bucket

PATIENCE_S = 30.0
"""So long a rank whose script has ended waits for the others to come to what is under way."""


class NcclGatherChannel:
    """A `smorms3_dist.collectives.base.GatherChannel`, without a thread.

    Args:
        collectives: The ranks.
        memory: Of the GPU.
        comm: A communicator of NCCL that nobody else uses.
        wait: Waits for what it does.

    Attributes:
        rank: See `GatherChannel`.
        size: Likewise.
    """

    def __init__(
        self, collectives: Collectives, memory: CudaMemory, comm: Any, wait: BoundedWait
    ) -> None:
        # Until the host has waited for it: also what is gathered, so that it is still there.
        self._gathered: Any = None
        self._work: Callable[[GatherChannel], None] | None = None
        self.rank = collectives.rank
        self.size = collectives.size
        self._collectives = collectives
        self._memory = memory
        self._comm = comm
        self._wait = wait
        self._stream = memory.stream()
        end_after_words(self)

    def start_gather(self, work: Callable[[GatherChannel], None]) -> None:
        """See `GatherChannel.start_gather`."""
        memory = self._memory
        self._work = work
        with memory.current():
            self._stream.wait_event(memory.event(memory.current_stream()))
            with self._stream:
                try:
                    work(self)
                finally:
                    self._gathered = memory.event(self._stream)

    def gather_in_turn(self, buckets: Iterable[tuple[Any, Bucket]]) -> Iterator[None]:
        """See `GatherChannel.gather_in_turn`: gives something when each has been launched."""
        sent = self._collectives.bytes_sent
        for flat, bucket in buckets:
            sent["all_gather"] += launch_all_gather(
                self._comm, self.rank, flat, bucket, self._stream
            )
            yield

    def all_gather(self, flat: Any, buckets: Sequence[Bucket]) -> None:
        """See `GatherChannel.all_gather`."""
        for _ in self.gather_in_turn((flat, bucket) for bucket in buckets):
            pass

    def hurry(self) -> None:
        """See `GatherChannel.hurry`: streams need not be told."""

    def stop_hurrying(self) -> None:
        """See `GatherChannel.stop_hurrying`."""

    def finish(self) -> None:
        """See `SideChannel.finish`: the host waits.

        Raises:
            NcclError: If the GPU or NCCL reports an error, or it does not end in time.
        """
        with self._collectives.wait.inside(f"in the {GATHERING}"):
            self._finish(self._wait)

    def _finish(self, wait: BoundedWait) -> None:
        gathered, self._gathered = self._gathered, None
        if gathered is not None:
            wait.wait_for(gathered, self._comm)
        self._work = None

    def end(self) -> None:
        """Lets it come to its end, before the script does; or gives it up.

        The process could not end before its GPU has.
        """
        try:
            self._finish(BoundedWait(self.rank, self._memory, PATIENCE_S))
        except NcclError as error:
            sys.stderr.write(f"smorms3_dist: as the script ends: {error}\n")

    def __del__(self) -> None:
        # CuPy's pool gives the memory of parameters to the next array, and asks no stream.
        with contextlib.suppress(NcclError):
            self._finish(self._wait)


def launch_all_gather(comm: Any, rank: int, flat: Any, bucket: Bucket, stream: Any) -> int:
    """Lets a stream gather a bucket of a flat buffer, in place; returns the bytes that are sent."""
    import cupy

    comm.allGather(
        flat[bucket.part_of(rank)].data.ptr,
        flat[bucket.start_f :].data.ptr,
        bucket.part_size,
        type_of(cupy.cuda.nccl, flat.dtype),
        stream.ptr,
    )
    sent: int = (bucket.size - bucket.part_size) * flat.itemsize
    return sent

"""The channels for what goes on beside the training: begun in one update, ended in the next.

Over MPI that is a thread with a communicator of its own; over NCCL a stream. Other transports, over
which two threads would get into each other's way, do it at once. What goes on beside the backward
and the forward pass does so over NCCL without a thread, too: see `nccl_early` and `nccl_gather`.
"""

from __future__ import annotations

import abc
import atexit
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from smorms3_dist.collectives.base import (
    Collectives,
    Consume,
    EarlyReduceScatter,
    GatherChannel,
    Gradients,
    Order,
    SideChannel,
    Work,
)
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.layout import Bucket, GroupLayout, Piece

REDUCTION = "reduction of the gradients in flight"
EARLY_REDUCTION = "reduction that begins with the backward pass"
GATHERING = "gathering of parameters beside the next forward pass"

_PATIENCE_S = 30.0
"""So long a rank that ends its script waits for what goes on beside it."""


class OnStream(SideChannel):
    """Gives it to a stream of the GPU's; no host waits for that."""

    def __init__(self, collectives: Collectives, memory: CudaMemory) -> None:
        self._collectives = collectives
        self._memory = memory
        self._stream = memory.stream()
        self._done: Any = None

    def start(self, work: Work) -> None:
        """See `SideChannel.start`."""
        self._stream.wait_event(self._memory.event(self._memory.current_stream()))
        with self._stream:
            work(self._collectives)
        self._done = self._memory.event(self._stream)

    def finish(self) -> None:
        """See `SideChannel.finish`; it is the stream of the update that waits."""
        if self._done is not None:
            # Also whoever copies or pickles an optimizer comes here, with a GPU of its own.
            with self._memory.current():
                self._memory.current_stream().wait_event(self._done)
            self._done = None


class InThread(SideChannel):
    """Does it in a thread, by a `reduce_scatter` that may run beside all other collectives.

    Args:
        collectives: The ranks, as the main thread reaches them.

    It can be given up by all ranks together, when one of them has turned out not to come there: it
    is an `EarlyChannel` as well.

    Attributes:
        rank: See `GatherChannel`.
        size: Likewise.
        hurried: Set while somebody waits for it.
        is_abandoned: Whether it has been given up.
        has_thread: See `EarlyReduceScatter`.
        pause_s: Likewise.
    """

    has_thread = True
    pause_s: float | None = None

    def __init__(self, collectives: Collectives) -> None:
        self.hurried = threading.Event()
        self.is_abandoned = False
        # What is under way, or was the last.
        self._what = REDUCTION
        self._wait = collectives.wait
        self._phases = collectives.phases
        self.rank = collectives.rank
        self.size = collectives.size
        self._pieces = collectives.pieces
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        end_with_script(self)

    def prepare(self, group: GroupLayout, turns: Sequence[int]) -> Order:
        """See `EarlyChannel.prepare`."""

        def when(piece: Piece) -> int:
            return max(turns[segment.slot.index] for segment in piece.segments)

        return [sorted(of_rank, key=when) for of_rank in self._pieces(group)]

    @abc.abstractmethod
    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        """See `ReduceScatter`."""

    @abc.abstractmethod
    def reduce_in_order(
        self, group: GroupLayout, gradients: Gradients, consume: Consume, order: Order
    ) -> Iterable[Bucket]:
        """See `EarlyReduceScatter.reduce_in_order`."""

    @abc.abstractmethod
    def gather_in_turn(self, buckets: Iterable[tuple[Any, Bucket]]) -> Iterator[None]:
        """See `GatherChannel.gather_in_turn`."""

    def all_gather(self, flat: Any, buckets: Sequence[Bucket]) -> None:
        """See `GatherChannel.all_gather`."""
        for _ in self.gather_in_turn((flat, bucket) for bucket in buckets):
            pass

    @abc.abstractmethod
    def progress(self) -> None:
        """See `EarlyReduceScatter.progress`."""

    def start(self, work: Work) -> None:
        """See `SideChannel.start`."""
        self._start(work, REDUCTION)

    def start_early(self, work: Callable[[EarlyReduceScatter], Iterator[None]]) -> None:
        """See `EarlyChannel.start_early`."""
        self._start(lambda ranks: list(work(ranks)), EARLY_REDUCTION)

    def start_gather(self, work: Callable[[GatherChannel], None]) -> None:
        """See `GatherChannel.start_gather`."""
        self._start(work, GATHERING)

    def _start(self, work: Callable[[Any], Any], what: str) -> None:
        self._what = what
        self.hurried.clear()
        self._thread = threading.Thread(
            target=self._run, args=(work,), name=f"smorms3_dist {what.split()[0]}", daemon=True
        )
        self._thread.start()

    def _run(self, work: Callable[[Any], Any]) -> None:
        try:
            with self._phases.beside(self._what):
                work(self)
        except BaseException as error:
            self._error = error

    def hurry(self) -> None:
        """See `EarlyChannel.hurry`."""
        self.hurried.set()

    def stop_hurrying(self) -> None:
        """See `GatherChannel.stop_hurrying`."""
        self.hurried.clear()

    def abandon(self) -> None:
        """See `EarlyChannel.abandon`."""
        self.is_abandoned = True
        self.hurried.set()

    def finish(self) -> None:
        """See `SideChannel.finish`."""
        if self._thread is None:
            return
        self.hurried.set()
        with self._wait.inside(f"in the {self._what}"):
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise has_failed(self.rank, error, self._what)

    def end(self) -> None:
        """Lets the thread come to its end, before the script does; in bounded time."""
        if self._thread is None:
            return
        # Nobody waits for it: no update has come to make use of it.
        if self._what == EARLY_REDUCTION:
            self.abandon()
        self.hurried.set()
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            sys.stderr.write(
                f"smorms3_dist: rank {self.rank} ends, although the {self._what} has not: "
                "another rank has not come to it\n"
            )


def has_failed(rank: int, error: BaseException, what: str) -> RuntimeError:
    """The error of a channel whose work has failed on a rank."""
    failed = RuntimeError(f"rank {rank}: the {what} has failed: {type(error).__name__}: {error}")
    failed.__cause__ = error
    return failed


class _Ending(Protocol):
    def end(self) -> None:
        """Comes to its end, before the script does; in bounded time."""


_endings: weakref.WeakSet[_Ending] = weakref.WeakSet()
_last: weakref.WeakSet[_Ending] = weakref.WeakSet()


def end_with_script(ending: _Ending) -> None:
    """Lets something come to its end before the script does, if it is still in use then.

    That is before the others are told that this rank's script ends.
    """
    if not _endings:
        # After the words of the communicator, which are the last thing that a rank says.
        atexit.unregister(_end)
        atexit.register(_end)
    _endings.add(ending)


def end_after_words(ending: _Ending) -> None:
    """The same, when all ranks have ended their scripts, or have been told."""
    _last.add(ending)


def _end() -> None:
    for ending in list(_endings):
        ending.end()


@atexit.register
def _end_last() -> None:
    # What is registered first comes last: nobody has words yet.
    for ending in list(_last):
        ending.end()

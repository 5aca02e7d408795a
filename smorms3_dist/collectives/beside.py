"""The channels for what ranks reduce beside the training: begun in one update, ended in the next.

Over MPI that is a thread with a communicator of its own; over NCCL a stream. Other transports, over
which two threads would get into each other's way, do it at once.
"""

from __future__ import annotations

import abc
import atexit
import sys
import threading
import weakref
from typing import Any

from smorms3_dist.collectives.base import Collectives, Consume, Gradients, SideChannel, Work
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.layout import GroupLayout

_WAIT = "in the reduction of gradients that goes on beside the training"

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

    Attributes:
        hurried: Set while somebody waits for it.
    """

    def __init__(self, collectives: Collectives) -> None:
        self.hurried = threading.Event()
        self._wait = collectives.wait
        self._phases = collectives.phases
        self._rank = collectives.rank
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if not _channels:
            # After the words of the communicator, which are the last thing that a rank says.
            atexit.unregister(_end)
            atexit.register(_end)
        _channels.add(self)

    @abc.abstractmethod
    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        """See `ReduceScatter`."""

    def start(self, work: Work) -> None:
        """See `SideChannel.start`."""
        self.hurried.clear()
        self._thread = threading.Thread(
            target=self._run, args=(work,), name="smorms3_dist reduction", daemon=True
        )
        self._thread.start()

    def _run(self, work: Work) -> None:
        try:
            with self._phases.beside("reduction of the gradients in flight"):
                work(self)
        except BaseException as error:
            self._error = error

    def finish(self) -> None:
        """See `SideChannel.finish`."""
        if self._thread is None:
            return
        self.hurried.set()
        with self._wait.inside(_WAIT):
            self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise RuntimeError(
                f"rank {self._rank}: the reduction of gradients beside the training has failed: "
                f"{type(error).__name__}: {error}"
            ) from error

    def end(self) -> None:
        """Lets the thread come to its end, before the script does; in bounded time."""
        if self._thread is None:
            return
        self.hurried.set()
        self._thread.join(_PATIENCE_S)
        if self._thread.is_alive():
            sys.stderr.write(
                f"smorms3_dist: rank {self._rank} ends, although the reduction of its last "
                "gradients has not: another rank has not come to it\n"
            )


_channels: weakref.WeakSet[InThread] = weakref.WeakSet()


def _end() -> None:
    for channel in list(_channels):
        channel.end()

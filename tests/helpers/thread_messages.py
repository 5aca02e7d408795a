"""Messages between ranks that are threads, with the methods of an MPI communicator that they need.

As MPI may, it takes what is sent from where it lies when it is received, and not before: what is
sent too early or overwritten too soon arrives wrong.
"""

from __future__ import annotations

import collections
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class Wires:
    """What the ranks of one world have under way, and the bytes of all messages that arrived.

    Attributes:
        arrived: Sizes in bytes, in order, by sender and receiver.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.arrived: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        self._queues: dict[Any, queue.Queue[Sent]] = collections.defaultdict(queue.Queue)
        self._lock = threading.Lock()

    def queue(self, *key: int) -> queue.Queue[Sent]:
        with self._lock:
            return self._queues[key]

    @property
    def left_over(self) -> int:
        """Messages that nobody has received."""
        return sum(each.qsize() for each in self._queues.values())


class Sent:
    """A request of a message; it is done when the data is taken."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data
        self.taken = threading.Event()

    def wait(self) -> None:
        assert self.taken.wait(60), "nobody has received a message"


class ThreadComm:
    """One rank's communicator.

    Attributes:
        posted: What it was asked for, in order: sends and receives.
    """

    def __init__(self, rank: int, wires: Wires) -> None:
        self.rank, self.size, self._wires = rank, wires.size, wires
        self.posted: list[str] = []

    def Isend(self, buffer: list[Any], dest: int, tag: int = 0) -> Sent:
        self.posted.append("send")
        sent = Sent(buffer[0])
        self._wires.queue(self.rank, dest, tag).put(sent)
        return sent

    def Irecv(self, buffer: list[Any], source: int, tag: int = 0) -> Callable[[], None]:
        self.posted.append("receive")
        messages = self._wires.queue(source, self.rank, tag)

        def receive() -> None:
            sent = messages.get(timeout=60)
            assert sent.data.nbytes == buffer[0].nbytes, "sender and receiver cut alike"
            buffer[0][...] = sent.data
            self._wires.arrived[source, self.rank].append(sent.data.nbytes)
            sent.taken.set()

        return receive


def waitall(requests: list[Any]) -> None:
    """Receives first, since whoever waits for messages of others must let them have its own."""
    for request in requests:
        if not isinstance(request, Sent):
            request()
    for request in requests:
        if isinstance(request, Sent):
            request.wait()


def run_ranks(size: int, function: Callable[[ThreadComm], Any]) -> Wires:
    """Runs a function on each rank; raises what the first failing one raised."""
    wires, failures = Wires(size), []

    def run(rank: int) -> None:
        try:
            function(ThreadComm(rank, wires))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    assert not wires.left_over
    return wires

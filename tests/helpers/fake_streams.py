"""Streams and events of CUDA, in a process without a GPU.

Streams that are made here are as late as they may be. What they are given happens when somebody
waits for it, on the host or on another stream: without the wait, or in memory that was used again
too soon, it gives wrong values. CuPy's own stream, which is the current one unless a test says
otherwise, does everything at once.
"""

from __future__ import annotations

import collections
import itertools
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

_streams = threading.local()
changed = threading.Condition()
_by_pointer: weakref.WeakValueDictionary[int, Stream] = weakref.WeakValueDictionary()
_pointers = itertools.count(1)
_alive: list[Any] = []

LIMIT_S = 30


def current() -> Stream:
    return getattr(_streams, "stack", [main])[-1]


def keep_alive(array: Any) -> Any:
    """Keeps memory that late streams may still have to do with, as CuPy's pool does."""
    if current().late:
        _alive.append(array)
    return array


def stream_at(pointer: int) -> Stream:
    return main if pointer == 0 else _by_pointer[pointer]


def wait_for_change(what: str) -> None:
    """Lets others go on, until one of them has done something; the lock must be held."""
    assert changed.wait(LIMIT_S), f"nobody did anything for {LIMIT_S} s: {what}"


class Stream:
    """A stream that does what it is given as late as it may, or when its luck says so.

    Whoever waits for it does its work: also another rank, where NCCL needs this one.
    """

    late = True
    current_gpu: Callable[[], int] = staticmethod(lambda: 0)
    """Which GPU is the current one; streams and events are those of one."""
    luck: Callable[[], bool] | None = None
    """Whether a stream does at once what it was given so far; asked each time that it is given."""

    def __init__(self, non_blocking: bool = False) -> None:
        self.ptr = next(_pointers)
        self.gpu: int | None = self.current_gpu()
        _by_pointer[self.ptr] = self
        self._queue: collections.deque[Callable[[], Any]] = collections.deque()
        self._done = 0
        self._worker: int | None = None

    def __enter__(self) -> Stream:
        # As CuPy does.
        assert self.gpu in (self.current_gpu(), None), "the stream is another GPU's"
        _streams.stack = [*getattr(_streams, "stack", [main]), self]
        return self

    def __exit__(self, *_: Any) -> None:
        _streams.stack = _streams.stack[:-1]

    def do(self, work: Callable[[], Any]) -> None:
        with changed:
            self._queue.append(work)
            changed.notify_all()
        if Stream.luck is not None and Stream.luck():
            self.synchronize()

    @property
    def given(self) -> int:
        """How many things it has been given so far."""
        with changed:
            return self._done + len(self._queue)

    @property
    def is_at_work(self) -> bool:
        return self._worker is not None

    def do_until(self, given: int) -> None:
        """Does the first so many of the things that it was given."""
        with changed, np.errstate(all="ignore"):
            while self._done < given:
                if self._worker is not None:
                    assert self._worker != threading.get_ident(), "a stream waits for itself"
                    wait_for_change("another thread does a stream's work")
                    continue
                self._worker = threading.get_ident()
                try:
                    self._queue[0]()
                finally:
                    self._worker = None
                self._queue.popleft()
                self._done += 1
                changed.notify_all()

    def synchronize(self) -> None:
        self.do_until(self.given)

    def wait_event(self, event: Event) -> None:
        stream, given = event.recorded()
        self.do(lambda: stream.do_until(given))


class _Main(Stream):
    """A stream that does everything at once."""

    late = False

    def __init__(self) -> None:
        super().__init__()
        self.ptr = 0
        # Of whichever is the current one.
        self.gpu = None

    def do(self, work: Callable[[], Any]) -> None:
        work()


main = _Main()


class Event:
    """An event that has happened as soon as anybody asks, unless the test says otherwise."""

    status: int | None = None
    """What CUDA answers when it is asked whether an event has happened, if the test says so."""

    def __init__(self, disable_timing: bool = False) -> None:
        self._recorded: tuple[Stream, int] | None = None
        self._gpu = Stream.current_gpu()
        self.ptr = self
        self.timed = not disable_timing
        self.at = 0.0

    def record(self, stream: Stream) -> None:
        assert self._gpu == (Stream.current_gpu() if stream.gpu is None else stream.gpu)
        self._recorded = stream, stream.given
        if self.timed:
            assert not stream.late, "only the stream that computes is timed"
            self.at = time.perf_counter()

    def recorded(self) -> tuple[Stream, int]:
        assert self._recorded is not None, "nobody records this event"
        return self._recorded

    def synchronize(self) -> None:
        stream, given = self.recorded()
        stream.do_until(given)

    @property
    def done(self) -> bool:
        # As CuPy's: also of an error that stays, nothing is said.
        return event_query(self) == 0


def elapsed_time(begin: Event, end: Event) -> float:
    """Milliseconds, as CUDA gives them: of float32, and between events that have happened."""
    assert begin.timed and end.timed and event_query(begin) == event_query(end) == 0
    return float(np.float32((end.at - begin.at) * 1000))


def event_query(event: Event) -> int:
    if Event.status is not None:
        return Event.status
    event.synchronize()
    return 0

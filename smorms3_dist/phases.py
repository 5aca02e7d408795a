"""Where the time of a rank goes: phases, one after the other, and what is recorded of them.

At each moment a rank is in one phase, so that the seconds of all phases sum up to the time that has
passed. Recording is off until somebody starts it, and costs one look at an attribute then. What
runs beside the training, such as the writing of a checkpoint, is in no phase: it has spans alone.
"""

from __future__ import annotations

import collections
import contextlib
import enum
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

_Method = TypeVar("_Method", bound=Callable[..., Any])


class Phase(enum.IntEnum):
    """What a rank does. Its ``key`` is what stands for it in reports."""

    COMPUTE = 0
    """Forward and backward: the loss within an update, and all that is outside of updates."""

    AGREE = 1
    """What ranks exchange before a step, and waiting there for the slowest."""

    LAYOUT = 2
    """Laying out the model, and the broadcast: in the first update, and when it has changed."""

    REDUCE = 3
    """Gradients on their way between ranks, and their mean."""

    HOOKS = 4
    """Hooks of the optimizer and of its rules, norms, and the check of gradients."""

    UPDATE = 5
    """The kernel, or the rule; and what Python does of a step."""

    GATHER = 6
    """Parameters on their way between ranks."""

    CHECKPOINT = 7
    """The training waits for a checkpoint: for the copy, or the save before."""

    @property
    def key(self) -> str:
        """The name in reports, in lower case."""
        return _KEYS[self]


_KEYS = tuple(phase.name.lower() for phase in Phase)


class TimeSource(Protocol):
    """Where the time of phases comes from.

    Attributes:
        waits: Whether a stamp has a time only when a device has come there.
    """

    waits: bool

    def stamp(self) -> Any:
        """Marks this moment."""

    def has_happened(self, stamp: Any) -> bool:
        """Whether the device has come to a stamp, and so to all before it."""

    def seconds(self, begin: Any, end: Any) -> float:
        """The time between two stamps that have happened."""

    def meet_host(self) -> tuple[Any, float]:
        """Waits for the device; returns a stamp of now, and its time of the host's clock."""


class HostClock:
    """The host's own; its stamps are seconds of `time.perf_counter`."""

    waits = False
    stamp = staticmethod(time.perf_counter)

    def has_happened(self, stamp: float) -> bool:
        """See `TimeSource.has_happened`."""
        return True

    def seconds(self, begin: float, end: float) -> float:
        """See `TimeSource.seconds`."""
        return end - begin

    def meet_host(self) -> tuple[float, float]:
        """See `TimeSource.meet_host`."""
        now = time.perf_counter()
        return now, now


HOST_CLOCK = HostClock()


class Span(NamedTuple):
    """Something that took time, or that happened, if it has no end.

    Attributes:
        name: What it was.
        track: `TRAINING` or `BESIDE`.
        begin: Seconds of `time.perf_counter`.
        end: Likewise, or ``None``.
        detail: More words on it.
    """

    name: str
    track: int
    begin: float
    end: float | None
    detail: str = ""


TRAINING, BESIDE = 0, 1
"""The tracks of spans: the thread of the training, and those of checkpoints."""


class Phases:
    """The phases of one rank. Only the thread of the training changes them.

    Attributes:
        on: Whether anything is recorded.
        seconds: What has been spent in each phase, by its number, since it began.
        spans: Takes what there was, in the order of the ends; ``None`` if nobody asks.
        timeline: What writes spans to a file, if anything does: `smorms3_dist.timeline`'s.
    """

    def __init__(self) -> None:
        self.on = False
        self.seconds = [0.0] * len(Phase)
        self.spans: collections.deque[Span] | None = None
        self.timeline: Any = None
        self._phase = Phase.COMPUTE
        self._clock: TimeSource = HOST_CLOCK
        # When the present phase began, as a stamp.
        self._since: Any = 0.0
        # What a device has still to come to, each from where the one before it ended: a phase with
        # its stamps, or the name of a step that ends there.
        self._pending: collections.deque[tuple[Phase, Any, Any] | str] = collections.deque()
        # By the host's clock: the end of the last phase that is counted, and of the last step.
        self._counted_at = self._step_at = 0.0

    def start(self) -> None:
        """Begins to record, if that has not begun."""
        if not self.on:
            self._phase = Phase.COMPUTE
            self._since, self._counted_at = self._clock.meet_host()
            self._step_at = self._counted_at
            self.on = True

    def use_clock(self, clock: TimeSource) -> None:
        """Takes time from another clock from now on."""
        if clock is self._clock:
            return
        self.settle()
        self._clock = clock
        if self.on:
            self._since, self._counted_at = clock.meet_host()

    def switch(self, phase: Phase) -> Phase:
        """Leaves the present phase for another; returns the one that was left."""
        before = self._phase
        if phase is not before:
            self._end_phase(self._clock.stamp())
            self._phase = phase
        return before

    def end_step(self, number: int) -> None:
        """Notes the end of an update; what comes is part of the next."""
        if not self.on:
            return
        self.switch(Phase.COMPUTE)
        if self._clock.waits:
            self._pending.append(f"step {number}")
            self._count_pending()
        else:
            self._count_step(f"step {number}")

    def settle(self) -> list[float]:
        """Counts the present phase up to now; returns the seconds of all. Waits for a device."""
        if self.on:
            stamp, now = self._clock.meet_host()
            self._end_phase(stamp)
            self._count_pending()
            self._counted_at = now
        return list(self.seconds)

    def _end_phase(self, stamp: Any) -> None:
        phase, begin, self._since = self._phase, self._since, stamp
        if self._clock.waits:
            self._pending.append((phase, begin, stamp))
        else:
            self._count(phase, stamp - begin)

    def _count_pending(self) -> None:
        """Counts what a device has come to."""
        pending, clock = self._pending, self._clock
        while pending:
            first = pending[0]
            if isinstance(first, str):
                self._count_step(first)
            elif clock.has_happened(first[2]):
                self._count(first[0], clock.seconds(*first[1:]))
            else:
                return
            pending.popleft()

    def _count(self, phase: Phase, seconds: float) -> None:
        self.seconds[phase] += seconds
        begin = self._counted_at
        self._counted_at = begin + seconds
        if self.spans is not None:
            self.spans.append(Span(_KEYS[phase], TRAINING, begin, self._counted_at))

    def _count_step(self, name: str) -> None:
        if self.spans is not None:
            self.spans.append(Span(name, TRAINING, self._step_at, self._counted_at))
        self._step_at = self._counted_at

    def during(self, phase: Phase) -> contextlib.AbstractContextManager[None]:
        """Is in a phase within a ``with`` block, and in the one that was, after it."""
        return _During(self, phase) if self.on else _NOTHING

    def within(self, phase: Phase, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is in a phase while it runs; the function itself where all is off."""
        if not self.on:
            return function

        def run(*args: Any) -> Any:
            before = self.switch(phase)
            try:
                return function(*args)
            finally:
                self.switch(before)

        return run

    @contextlib.contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """Notes what goes on beside the training within a ``with`` block; in any thread."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self.spans is not None:
                self.spans.append(Span(name, BESIDE, begin, time.perf_counter()))

    def happened(self, name: str, detail: str = "") -> None:
        """Notes that something has happened; in any thread."""
        if self.spans is not None:
            self.spans.append(Span(name, TRAINING, time.perf_counter(), None, detail))


class _During:
    """See `Phases.during`."""

    __slots__ = ("_before", "_phase", "_phases")

    def __init__(self, phases: Phases, phase: Phase) -> None:
        self._phases, self._phase = phases, phase

    def __enter__(self) -> None:
        self._before = self._phases.switch(self._phase)

    def __exit__(self, *_: object) -> None:
        self._phases.switch(self._before)


_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


def in_phase(phase: Phase) -> Callable[[_Method], _Method]:
    """Makes a method run in a phase. What it belongs to has ``phases``."""

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        def run(self: Any, *args: Any, **kwds: Any) -> Any:
            phases = self.phases
            if not phases.on:
                return method(self, *args, **kwds)
            with _During(phases, phase):
                return method(self, *args, **kwds)

        return run  # type: ignore[return-value]

    return decorate


of_process = Phases()
"""Those of the rank that this process is."""

"""What a rank waits for, and a voice for it: no wait goes on for long without a word.

A wait costs a few stores. A thread looks at them now and then, and says once of each wait that is
longer than a minute where this rank waits. What the others do it cannot know; but each that waits
says so as well, so whoever does not has not come.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import ClassVar

from smorms3_dist.phases import Phases
from smorms3_dist.rank_page import page

STALL_WARNING = "SMORMS3_STALL_WARNING"
"""The variable with the seconds after which a wait has a voice; 0 for never."""

_DEFAULT_S = 60.0

_IN_WAIT_S = 0.5
"""How long a rank waits until the launcher may know of it."""

_LOOK_S = 1.0
"""How often the thread looks, at most."""


def stall_warning() -> float:
    """The seconds after which a wait has a voice; infinite for never.

    Raises:
        ValueError: If the variable says something else.
    """
    text = os.environ.get(STALL_WARNING, "")
    if not text:
        return _DEFAULT_S
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if 0 <= seconds < math.inf:
            return seconds or math.inf
    raise ValueError(
        f"{STALL_WARNING}={text} is not a number of seconds: after so many a rank that waits says "
        "where; 0 is for never"
    )


class Wait:
    """Where one rank is in what all do together, and whether it waits.

    Args:
        rank: The rank.
        phases: Where its time goes, if somebody has begun with that.

    Attributes:
        updates: Updates to which all have come.
        occasion: What it does together with the others, such as ``update 15``, at present or last.
        at: What it waits in, or ``None``.
        since: The time, of a monotonic clock, when it began to. Stored before ``at``.
        gone: Which ranks have ended, in words; nothing can be done together any more then.
        phases: Where the time of the rank goes.
    """

    def __init__(self, rank: int, phases: Phases | None = None) -> None:
        self.rank = rank
        self.phases = Phases() if phases is None else phases
        self.updates = 0
        self.occasion = ""
        self.at: str | None = None
        self.since = 0.0
        self.gone = ""
        self._said = -1.0

    ENDED: ClassVar = "has ended its script"

    @property
    def farewell(self) -> str:
        """What a rank whose script has ended lets the others know."""
        return f"{self.ENDED} after {self.updates} update{'s' * (self.updates != 1)}"

    def seconds(self, now: float) -> float:
        """For how long it has been waiting; 0 if it does not."""
        # `since` is read last: if another wait has begun meanwhile, this is short.
        return now - self.since if self.at is not None else 0.0

    def words(self, now: float, limit: float) -> str | None:
        """What there is to be said, once, of a wait that is longer than so many seconds."""
        at, since = self.at, self.since
        if at is None or now - since < limit or since == self._said:
            return None
        self._said = since
        where = f"{self.occasion}, {at}" if self.occasion else at
        return (
            f"smorms3_dist: rank {self.rank} has waited for {now - since:.3g} s in {where}. Ranks "
            "that do not say so have not come there: they compute, evaluate or save, or hang. "
            f"({STALL_WARNING}=SECONDS says when to tell, 0 never)"
        )


class Watch:
    """A thread that gives waits a voice.

    Args:
        waits: The waits; looked through each time.
        limit: The seconds after which it says something.
        say: Takes what is said.
    """

    def __init__(
        self, waits: Iterable[Wait], limit: float, say: Callable[[str], object] | None = None
    ) -> None:
        self._waits = waits
        self._limit = limit
        self._say = say or _print
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="smorms3_dist waits", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends it."""
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        # The launcher is told more often than anything is said.
        pause = self._limit / 4
        if page.attached:
            pause = min(pause, _LOOK_S)
        while not self._over.wait(pause):
            now = time.monotonic()
            waits = list(self._waits)
            page.waits = any(wait.seconds(now) > min(_IN_WAIT_S, pause) for wait in waits)
            for wait in waits:
                words = wait.words(now, self._limit)
                if words is not None:
                    wait.phases.happened("stall", words)
                    self._say(words)
                    page.said += 1


def _print(words: str) -> None:
    # In one piece: other ranks write there, too.
    sys.stderr.write(words + "\n")
    sys.stderr.flush()


_waits: weakref.WeakSet[Wait] = weakref.WeakSet()
_watch: Watch | None = None
_watched_by = 0


def watch(wait: Wait) -> None:
    """Gives a wait a voice for as long as it is there.

    Raises:
        ValueError: If the variable `STALL_WARNING` is no number of seconds.
    """
    global _watch, _watched_by
    limit = stall_warning()
    _waits.add(wait)
    # A forked child has no thread.
    if not math.isinf(limit) and (_watch is None or _watched_by != os.getpid()):
        _watch, _watched_by = Watch(_waits, limit), os.getpid()

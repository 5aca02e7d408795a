"""What the launcher knows of each rank."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence

from smorms3_dist.launch.wire import Wire
from smorms3_dist.wording import ranks_in_words


@dataclasses.dataclass(eq=False)
class Rank:
    """One rank. Times are those of a monotonic clock, in seconds.

    Attributes:
        number: The number that MPI gives it.
        host: The host, as the launcher calls it.
        wire: The connection to its agent.
        entered, finished: How many updates it has begun, and finished.
        stepped_at, printed_at: When it last came further, or printed, or was started.
        heard_at: When its agent last sent something.
        waits: Whether it waits for others.
        said: How often it has said that it waits for long.
        has_left: Whether its script has ended.
        saves, saved: How many checkpoints it has made whole, and the step of the last one.
        gone_at: When the connection ended without a word, or ``None``.
        end: The exit status, negative for a signal; ``None`` as long as it runs.
        cut: Whether it was ended from outside.
        preempted: Whether it has saved a checkpoint, because it was asked to end.
    """

    number: int
    host: str
    wire: Wire
    entered: int = 0
    finished: int = 0
    stepped_at: float = dataclasses.field(default_factory=time.monotonic)
    printed_at: float = dataclasses.field(default_factory=time.monotonic)
    heard_at: float = dataclasses.field(default_factory=time.monotonic)
    waits: bool = False
    said: int = 0
    has_left: bool = False
    saves: int = 0
    saved: int = 0
    gone_at: float | None = None
    end: int | None = None
    cut: bool = False
    preempted: bool = False

    def hear(self, message: Mapping[str, object]) -> None:
        """Takes what its agent says."""
        self.heard_at = time.monotonic()
        at = message.get("at")
        if isinstance(at, list) and at != [self.entered, self.finished]:
            self.entered, self.finished = int(at[0]), int(at[1])
            self.stepped_at = self.heard_at
        waits = message.get("waits")
        if isinstance(waits, list):
            self.waits, self.said, self.has_left = bool(waits[0]), int(waits[1]), bool(waits[2])
        saved = message.get("saved")
        if isinstance(saved, list):
            self.saves, self.saved = int(saved[0]), int(saved[1])
        end = message.get("end")
        if isinstance(end, int):
            self.end = end
            self.cut = bool(message.get("cut"))
            self.preempted = bool(message.get("preempted"))

    @property
    def has_failed(self) -> bool:
        """Whether it has ended by itself, and not well."""
        return bool(self.end) and not self.cut and not self.preempted

    @property
    def last_sign(self) -> float:
        """When it last came further. One that has made no step yet does so by printing."""
        return self.stepped_at if self.entered else max(self.stepped_at, self.printed_at)


def named(ranks: Iterable[Rank]) -> str:
    """Ranks in words."""
    return ranks_in_words(rank.number for rank in ranks)


def stall_text(ranks: Sequence[Rank]) -> tuple[str, Rank]:
    """Who of all ranks waits and who is missing; and a rank that is likely to be the reason."""
    running = [rank for rank in ranks if rank.end is None]
    ended = [rank for rank in ranks if rank.end is not None]
    furthest = max(rank.entered for rank in running)
    inside = [r for r in running if r.entered == furthest and r.finished < furthest]
    behind = [r for r in running if r not in inside]
    parts = []
    if inside and furthest:
        parts.append(f"{named(inside)} in step {furthest}")
    if behind and inside:
        parts.append(f"{named(behind)} not come to it")
    elif behind and furthest:
        parts.append(f"{named(behind)} after step {furthest}, not in the next")
    elif behind:
        parts.append(f"{named(behind)} before the first step")
    if ended:
        parts.append(f"{named(ended)} ended already")
    return "; ".join(parts), (behind or inside)[0]


def wait_text(ranks: Sequence[Rank]) -> tuple[str, list[Rank]]:
    """Says which ranks wait for others, and which of these have not come.

    Returns:
        The text, and the ranks whose stacks say why.
    """
    left = [rank for rank in ranks if rank.has_left or rank.end is not None]
    there = [rank for rank in ranks if rank not in left]
    waiting = [rank for rank in there if rank.waits]
    missing = [rank for rank in there if not rank.waits]
    parts = []
    for entered, inside in sorted({(r.entered, r.entered > r.finished) for r in waiting}):
        alike = [r for r in waiting if (r.entered, r.entered > r.finished) == (entered, inside)]
        where = f"{'in' if inside else 'after'} step {entered}"
        parts.append(f"{_subject(alike, 'wait')} {where}")
    if missing:
        parts.append(f"{_subject(missing, 'have')} not come")
    if left:
        parts.append(f"{_subject(left, 'have')} ended the script")
    return "; ".join(parts), missing or waiting


def _subject(ranks: Sequence[Rank], verb: str) -> str:
    """Ranks that do something: ``rank 3 waits``, or ``ranks 0 and 1 wait``."""
    singular = {"wait": "waits", "have": "has"}[verb]
    return f"{named(ranks)} {singular if len(ranks) == 1 else verb}"

"""What the launcher knows of each rank."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

from smorms3_dist.launch.wire import Wire


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


def listed(ranks: Sequence[Rank]) -> str:
    """Ranks in words: ``rank 3``, or ``ranks 0, 1 and 5``; a few, if there are many."""
    numbers = [str(number) for number in sorted(rank.number for rank in ranks)]
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    if len(numbers) > 8:
        return f"ranks {', '.join(numbers[:8])} and {len(numbers) - 8} more"
    return f"ranks {', '.join(numbers[:-1])} and {numbers[-1]}"


def stall_text(ranks: Sequence[Rank]) -> tuple[str, Rank]:
    """Who of all ranks waits and who is missing; and a rank that is likely to be the reason."""
    running = [rank for rank in ranks if rank.end is None]
    ended = [rank for rank in ranks if rank.end is not None]
    furthest = max(rank.entered for rank in running)
    inside = [r for r in running if r.entered == furthest and r.finished < furthest]
    behind = [r for r in running if r not in inside]
    parts = []
    if inside and furthest:
        parts.append(f"{listed(inside)} in step {furthest}")
    if behind and inside:
        parts.append(f"{listed(behind)} not come to it")
    elif behind and furthest:
        parts.append(f"{listed(behind)} after step {furthest}, not in the next")
    elif behind:
        parts.append(f"{listed(behind)} before the first step")
    if ended:
        parts.append(f"{listed(ended)} ended already")
    return "; ".join(parts), (behind or inside)[0]

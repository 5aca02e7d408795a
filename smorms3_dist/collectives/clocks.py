"""How far the clock of each rank is ahead of rank 0's, without a word of the network's speed.

All ranks exchange their times, round after round. A rank has not got rank 0's time before that was
sent, and rank 0 has not got its time before that was sent: each round gives two bounds, between
which the difference lies whatever took how long, and the narrowest of all rounds count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from smorms3_dist.collectives.base import Collectives

_ROUNDS = 12


class Offset(NamedTuple):
    """How far a clock is ahead of another.

    Attributes:
        seconds: The middle of what it may be.
        uncertainty: How far it may be from there.
    """

    seconds: float
    uncertainty: float


def offset_to_rank_zero(collectives: Collectives, now: Callable[[], float]) -> Offset:
    """How far this rank's clock is ahead of rank 0's. Collective.

    Args:
        collectives: Reaches the other ranks.
        now: This rank's clock, in seconds.
    """
    mine = []
    for _ in range(_ROUNDS):
        sent = now()
        collectives.all_gather_object(None)
        mine.append((sent, now()))
    first = collectives.all_gather_object(mine)[0]
    if collectives.rank == 0:
        return Offset(0.0, 0.0)
    rounds = list(zip(mine, first, strict=True))
    lowest = max(sent - got_there for (sent, _), (_, got_there) in rounds)
    highest = min(got - sent_there for (_, got), (sent_there, _) in rounds)
    return Offset((lowest + highest) / 2, (highest - lowest) / 2)


def align_timelines(collectives: Collectives) -> None:
    """Notes in the timelines how far clocks are apart, if any rank has a timeline. Collective."""
    timeline = collectives.phases.timeline
    if any(collectives.all_gather_object(timeline is not None)):
        now = time.time if timeline is None else timeline.now
        offset = offset_to_rank_zero(collectives, now)
        if timeline is not None:
            timeline.note_clock(*offset)

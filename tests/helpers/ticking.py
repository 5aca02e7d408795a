"""A clock for phases, in the place of the host's: no test waits for time to pass."""

from __future__ import annotations


class Ticking:
    """A clock of which each look takes a second."""

    waits = False

    def __init__(self) -> None:
        self.now = 0.0

    def stamp(self) -> float:
        self.now += 1
        return self.now

    def meet_host(self) -> tuple[float, float]:
        return self.stamp(), self.now

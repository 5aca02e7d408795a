"""The numbers of one rank, and what stands for those of all, under plain keys.

`KEYS` is the table of them: docs/seeing.md has the same, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from smorms3_dist.phases import Phase

PREFIX = "smorms3/"
"""What all keys begin with."""

PHASE_KEYS = tuple(f"{phase.key}_s" for phase in Phase)
"""Of the seconds of each phase, in the order of `Phase`."""

KEYS = {
    "step_s": "mean",
    **dict.fromkeys(PHASE_KEYS, "mean"),
    "sent_bytes": "mean",
    "sent_gb_per_s": "mean",
    "state_bytes": "max",
    "rss_bytes": "max",
    "gpu_bytes": "max",
}
"""Each number of a rank, and what of all ranks' stands for them."""

IMBALANCE, SLOWEST = "imbalance", "slowest_rank"
"""What only all ranks together have."""

_OWN = (Phase.COMPUTE, Phase.HOOKS, Phase.UPDATE)
_SENDING = (Phase.REDUCE, Phase.UPDATE, Phase.GATHER)


class RankNumbers(NamedTuple):
    """What one rank has done since the last reading.

    Attributes:
        steps: Updates.
        phases: Seconds in each phase, by its number.
        sent: Bytes that it has sent to others.
        memory: Bytes that it holds, by key: ``state_bytes``, ``rss_bytes``, and ``gpu_bytes`` where
            its model is on a GPU.
    """

    steps: float
    phases: tuple[float, ...]
    sent: int
    memory: dict[str, int]

    @property
    def own_s(self) -> float:
        """Seconds of a step in which it did not wait for others."""
        return sum(self.phases[phase] for phase in _OWN) / self.steps if self.steps else 0.0

    def by_key(self) -> dict[str, float]:
        """The numbers of a step, and the memory, by the keys of `KEYS`."""
        if not self.steps:
            return dict(self.memory)
        sending = sum(self.phases[phase] for phase in _SENDING)
        return {
            "step_s": sum(self.phases) / self.steps,
            **{
                key: seconds / self.steps
                for key, seconds in zip(PHASE_KEYS, self.phases, strict=True)
            },
            "sent_bytes": self.sent / self.steps,
            "sent_gb_per_s": self.sent / sending / 1e9 if sending else 0.0,
            **self.memory,
        }


def summary(ranks: Sequence[RankNumbers], by_rank: bool = False) -> dict[str, float]:
    """What stands for all ranks, by whole keys.

    Args:
        ranks: The numbers, by rank.
        by_rank: Whether those of each rank come besides, as ``smorms3/rank0/step_s``.
    """
    everybodys = [numbers.by_key() for numbers in ranks]
    found: dict[str, float] = {}
    for key, kind in KEYS.items():
        values = [numbers[key] for numbers in everybodys if key in numbers]
        if values:
            found[key] = max(values) if kind == "max" else sum(values) / len(values)
    own = [numbers.own_s for numbers in ranks]
    if any(own):
        found[IMBALANCE] = max(own) * len(own) / sum(own)
        found[SLOWEST] = own.index(max(own))
    for rank, numbers in enumerate(everybodys if by_rank else ()):
        found.update({f"rank{rank}/{key}": value for key, value in numbers.items()})
    return {f"{PREFIX}{key}": value for key, value in found.items()}

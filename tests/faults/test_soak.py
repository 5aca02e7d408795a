"""A short soak; ``bash tests/faults/soak.sh`` is the long one."""

from __future__ import annotations

from typing import Any

import pytest
import soak

STEPS = 1000


@pytest.mark.mpi
def test_a_training_that_is_killed_comes_to_the_same_and_keeps_nothing() -> None:
    jobs, complaint = soak.soak(100, [70])
    assert not complaint
    starts = [{r["start"] for r in reports if "start" in r} for reports in jobs]
    assert starts in ([set(), {40}, {None}], [set(), {60}, {None}])
    for rank in (0, 1):
        for name, in_flight in (("descriptors", 4), ("threads", 1)):
            taken = [r[name] for r in jobs[-1] if r["rank"] == rank and name in r]
            assert len(taken) == 100
            # Five steps are saved.
            assert max(taken[50:]) <= max(taken[:50]) + in_flight


def samples(**growths: float) -> list[soak.Reports]:
    """Two jobs of two ranks, of which the second grows by so much in a step."""

    def sample(rank: int, iteration: int) -> dict[str, Any]:
        taken = {
            name: int(10 + iteration * rank * growths.get(name, 0)) + iteration % 3
            for name in soak.LIMITS
        }
        # What fills in the beginning is no leak.
        taken["memory"] += min(iteration, STEPS // 10) * 10_000
        return {"rank": rank, "iteration": iteration, **taken}

    ends = [{"rank": rank, "t": 7, "digest": "x", "start": 3} for rank in (0, 1)]
    return [
        [*(sample(rank, i) for rank in (0, 1) for i in range(first, STEPS, 5)), *ends]
        for first in (0, STEPS // 2)
    ]


def test_a_small_leak_is_told() -> None:
    assert soak.growth(samples(), STEPS) == []
    for name, growth in (("memory", 1024), ("descriptors", 0.01), ("threads", 0.01)):
        (told,) = soak.growth(samples(**{name: growth}), STEPS)
        assert told.startswith(f"rank 1: {name} grow by {str(growth)[:3]}")

"""Where ChainerMN hangs, or its ranks come to differ, these do neither. On MPI ranks."""

from __future__ import annotations

import mpirun
import pytest

pytestmark = pytest.mark.mpi

# What is counted in t: six calls, less those that broadcast. A second setup starts at 0.
STEPS = {
    "lazy_on_one_rank": 4,
    "unused_on_one_rank": 5,
    "link_replaced": 4,
    "link_added": 4,
    "noise": 5,
    "set_up_again": 2,
}


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
@pytest.mark.parametrize("hazard", STEPS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_all_ranks_go_on_and_have_the_same_parameters(
    world_size: int, hazard: str, gradients: str
) -> None:
    reports = mpirun.run_worlds(3, "hazards.py")[world_size]
    results = [values[f"{hazard}, {gradients}"] for values in reports]
    assert len({result["digest"] for result in results}) == 1
    for result in results:
        assert result["finite"]
        assert result["moved"]
        assert result["t"] == STEPS[hazard]

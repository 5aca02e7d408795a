"""A short part of the campaign of random faults; ``bash tests/faults/run.sh`` is the long one."""

from __future__ import annotations

import campaign
import pytest
from kinds import BY_RANKS, BY_THREADS, Fault

# No step is made where the loss scale is dynamic and a gradient is not finite.
pytestmark = pytest.mark.filterwarnings("ignore:.*is not finite:UserWarning")

PER_KIND = 2


def first_seeds(kind: str, kinds: list[str], count: int) -> list[int]:
    """The first seeds that draw a kind."""
    found = (seed for seed in range(10_000) if Fault.drawn(seed, kinds).kind == kind)
    return [next(found) for _ in range(count)]


@pytest.mark.parametrize("kind", BY_THREADS)
def test_each_fault_ends_in_the_right_result_or_a_named_error_by_threads(kind: str) -> None:
    seeds = first_seeds(kind, BY_THREADS, PER_KIND)
    counts, complaints = campaign.campaign(campaign.by_threads, seeds, BY_THREADS)
    assert counts == {kind: PER_KIND}
    assert not complaints


@pytest.mark.mpi
@pytest.mark.parametrize(
    "kind", ["is killed", "raises in a hook", "another order of optimizers", "looks before"]
)
def test_each_fault_ends_in_the_right_result_or_a_named_error_by_real_ranks(kind: str) -> None:
    seeds = first_seeds(kind, BY_RANKS, 1)
    _, complaints = campaign.campaign(campaign.by_ranks, seeds, BY_RANKS)
    assert not complaints


def test_a_fault_that_is_not_named_and_a_result_that_is_wrong_are_complained_of() -> None:
    seed = first_seeds("nothing", BY_THREADS, 1)[0]
    nothing = Fault.drawn(seed, BY_THREADS)
    right = {rank: {"digest": campaign.right_digest(nothing)} for rank in range(nothing.world)}
    assert not campaign.complaint(nothing, right)
    assert campaign.complaint(nothing, {**right, 1: {"digest": "another"}})
    assert campaign.complaint(nothing, {0: right[0]})
    for kind in BY_THREADS:
        fault = Fault.drawn(first_seeds(kind, BY_THREADS, 1)[0], BY_THREADS)
        said = {rank: {"said": "some other error"} for rank in range(fault.world)}
        assert campaign.complaint(fault, said)

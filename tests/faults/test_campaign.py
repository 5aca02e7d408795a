"""A short part of the campaign of random faults; ``bash tests/faults/run.sh`` is the long one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import campaign
import pytest
from kinds import BY_RANKS, BY_THREADS, Fault

# No step is made where the loss scale is dynamic and a gradient is not finite.
pytestmark = pytest.mark.filterwarnings("ignore:.*is not finite:UserWarning")

PER_KIND = 2


def first(kind: str, kinds: list[str]) -> Iterator[Fault]:
    """The faults of a kind, by their seeds."""
    drawn = (Fault.drawn(seed, kinds) for seed in itertools.count())
    return (fault for fault in drawn if fault.kind == kind)


@pytest.mark.parametrize("kind", BY_THREADS)
def test_each_fault_ends_in_the_right_result_or_a_named_error_by_threads(kind: str) -> None:
    faults = itertools.islice(first(kind, BY_THREADS), PER_KIND)
    counts, complaints = campaign.campaign(campaign.by_threads, faults)
    assert counts == {kind: PER_KIND}
    assert not complaints


@pytest.mark.mpi
@pytest.mark.parametrize(
    "kind", ["is killed", "raises in a hook", "another order of optimizers", "looks before"]
)
def test_each_fault_ends_in_the_right_result_or_a_named_error_by_real_ranks(kind: str) -> None:
    assert not campaign.by_ranks(next(first(kind, BY_RANKS)))


def test_a_fault_that_is_not_named_and_a_result_that_is_wrong_are_complained_of() -> None:
    nothing = next(first("nothing", BY_THREADS))
    right = {rank: {"digest": campaign.right_digest(nothing)} for rank in range(nothing.world)}
    assert not campaign.complaint(nothing, right)
    assert campaign.complaint(nothing, {**right, 1: {"digest": "another"}})
    assert campaign.complaint(nothing, {0: right[0]})
    for kind in BY_THREADS:
        fault = next(first(kind, BY_THREADS))
        said = {rank: {"said": "some other error"} for rank in range(fault.world)}
        assert campaign.complaint(fault, said)

"""Collectives: the same results, in the same order of sums, over every transport."""

from __future__ import annotations

import threading

from smorms3_dist.collectives import base
from smorms3_dist.collectives.base import Reducer
from smorms3_dist.collectives.connect import connect
from smorms3_dist.collectives.mpi import check_launcher

import collective_checks
import mpirun
import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks


@pytest.mark.parametrize("check", collective_checks.CHECKS)
def test_threads(check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "PIECE_BYTES", base.SMALLEST_PIECE_BYTES)
    for world_size in 1, 2, 3, 4, 5:
        run_ranks(world_size, check)


@pytest.mark.mpi
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_mpi_ranks_over_bare_mpi_chainermn_and_the_interface_alone(world_size: int) -> None:
    for values in mpirun.run_program(world_size, "collectives.py"):
        counts = list(values["bytes_sent"].values())
        assert counts == [counts[0]] * 3, "all transports count alike"
        assert "cannot be pickled; give it to the restored optimizer" in values["refusal"]


def test_a_mean_of_float16_in_range_does_not_overflow_on_the_way() -> None:
    big = np.full(3, 60000, np.float16)
    mean = Reducer(big.dtype, 2, 3)([big, big]).evaluated()
    assert mean.dtype == np.float16
    np.testing.assert_array_equal(mean, big)


def test_infinities_and_nans_pass_through_the_mean() -> None:
    parts = [np.array([np.inf, np.inf, np.nan, 1], "f"), np.array([-np.inf, 1, 1, 1], "f")]
    mean = Reducer(np.dtype("f"), 2, 4)(parts).evaluated()
    np.testing.assert_array_equal(mean, np.array([np.nan, np.inf, np.nan, 1], "f"))


def test_the_mean_is_valid_for_pieces_of_different_length() -> None:
    reducer = Reducer(np.dtype("d"), 2, 10)
    for size in (10, 3, 7):
        parts = [np.arange(size, dtype="d"), np.ones(size)]
        mean = reducer(parts).evaluated()
        np.testing.assert_array_equal(mean, (np.arange(size) + 1) / 2)


def test_a_failing_rank_releases_the_others_and_its_error_is_raised() -> None:
    def fail_on_rank_1(collectives: ThreadCollectives) -> None:
        if collectives.rank == 1:
            raise ZeroDivisionError("on rank 1")
        collectives.all_reduce_or(1)

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="on rank 1"):
        run_ranks(3, fail_on_rank_1)
    assert threading.active_count() == before


def test_what_is_no_communicator_is_refused() -> None:
    with pytest.raises(TypeError, match=r"lacks alltoall, bcast.*create_communicator"):
        connect(object())


@pytest.mark.parametrize(
    "environment",
    [
        {"OMPI_COMM_WORLD_SIZE": "4"},
        {"PMI_SIZE": "2"},
        {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"},
    ],
)
def test_a_launcher_that_does_not_match_the_mpi_library_is_refused(
    environment: dict[str, str],
) -> None:
    with pytest.raises(RuntimeError, match="launcher and the library do not match"):
        check_launcher(1, environment)


@pytest.mark.parametrize(
    ("world_size", "environment"),
    [
        (1, {}),
        (4, {"OMPI_COMM_WORLD_SIZE": "4"}),
        (1, {"OMPI_COMM_WORLD_SIZE": "1"}),
        # The batch script of a Slurm job, which no launcher has started.
        (1, {"SLURM_STEP_ID": "batch", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "3"}),
    ],
)
def test_launchers_that_match_pass(world_size: int, environment: dict[str, str]) -> None:
    check_launcher(world_size, environment)

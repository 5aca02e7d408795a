"""Collectives: the same results, in the same order of sums, over every transport."""

from __future__ import annotations

from typing import Any

from smorms3_dist.collectives import base
from smorms3_dist.collectives.base import Reducer
from smorms3_dist.collectives.connect import connect
from smorms3_dist.collectives.mpi import check_launcher

import collective_checks
import mpirun
import numpy as np
import pytest
from rank_threads import run_ranks


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
        # MPI takes no temporary of thousands of pages.
        assert values["faults"] < 1000


@pytest.mark.parametrize(
    ("dtype", "parts", "expected"),
    [
        # In range, it does not overflow on the way.
        ("float16", ([60000] * 3, [60000] * 3), [60000] * 3),
        (
            "float32",
            ([np.inf, np.inf, np.nan, 1], [-np.inf, 1, 1, 1]),
            [np.nan, np.inf, np.nan, 1],
        ),
    ],
)
def test_means_of_large_numbers_infinities_and_nans(dtype: str, parts: Any, expected: Any) -> None:
    mean = Reducer(np.dtype(dtype), 2, 4)([np.array(part, dtype) for part in parts]).evaluated()
    assert mean.dtype == dtype
    np.testing.assert_array_equal(mean, np.array(expected, dtype))


def test_the_mean_is_valid_for_pieces_of_different_length() -> None:
    reducer = Reducer(np.dtype("d"), 2, 10)
    for size in (10, 3, 7):
        mean = reducer([np.arange(size, dtype="d"), np.ones(size)]).evaluated()
        np.testing.assert_array_equal(mean, (np.arange(size) + 1) / 2)


def test_what_is_no_communicator_is_refused() -> None:
    with pytest.raises(TypeError, match=r"lacks alltoall, bcast.*create_communicator"):
        connect(object())


@pytest.mark.parametrize(
    ("environment", "fitting"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"PMI_SIZE": "2"}, 2),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}, 3),
    ],
)
def test_a_launcher_that_does_not_match_the_mpi_library_is_refused(
    environment: dict[str, str], fitting: int
) -> None:
    check_launcher(fitting, environment)
    with pytest.raises(RuntimeError, match="launcher and the library do not match"):
        check_launcher(1, environment)


def test_one_process_alone_passes() -> None:
    # The batch script of a Slurm job, which no launcher has started.
    batch = {"SLURM_STEP_ID": "batch", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "3"}
    for environment in ({}, {"OMPI_COMM_WORLD_SIZE": "1"}, batch):
        check_launcher(1, environment)

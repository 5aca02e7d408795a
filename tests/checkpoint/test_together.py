"""Failing together: what one rank raises, all raise, each as far as it concerns it."""

from __future__ import annotations

import socket
from pathlib import Path

from smorms3_dist import CheckpointError
from smorms3_dist.checkpoint.together import together

import pytest
from rank_threads import ThreadCollectives, run_ranks


def test_a_block_that_no_rank_fails_in_is_passed(tmp_path: Path) -> None:
    def run(collectives: ThreadCollectives) -> int:
        with together(collectives, tmp_path):
            done = collectives.rank
        return done

    assert run_ranks(3, run) == [0, 1, 2]


@pytest.mark.parametrize("failing", [[1], [1, 2], [0, 1, 2]])
def test_all_ranks_raise_what_the_first_has_raised(tmp_path: Path, failing: list[int]) -> None:
    def run(collectives: ThreadCollectives) -> str:
        rank = collectives.rank
        with (
            pytest.raises(CheckpointError) as caught,
            together(collectives, tmp_path, "seen by rank"),
        ):
            if rank in failing:
                raise CheckpointError(f"file{rank}", "is full")
        assert isinstance(caught.value.__cause__, CheckpointError) == (rank in failing)
        return str(caught.value)

    first = failing[0]
    words = f"file{first}: is full (seen by rank {first} on {socket.gethostname()})"
    assert run_ranks(3, run) == [words] * 3


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError])
def test_any_other_error_stays_what_it_is_where_it_was_raised(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    def run(collectives: ThreadCollectives) -> None:
        expected = kind if collectives.rank == 1 else CheckpointError
        with pytest.raises(expected) as caught, together(collectives, tmp_path):
            if collectives.rank == 1:
                raise kind("why")
        if collectives.rank != 1:
            assert f"{tmp_path}: {kind.__name__}('why') (rank 1 on " in str(caught.value)

    run_ranks(2, run)

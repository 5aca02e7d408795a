"""Failing together: what one rank raises, all raise, each as far as it concerns it."""

from __future__ import annotations

import socket
from pathlib import Path

from smorms3_dist import CheckpointError
from smorms3_dist.checkpoint.together import together

import pytest
from rank_threads import ThreadCollectives, run_ranks


@pytest.mark.parametrize("kind", [CheckpointError, KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("failing", [[], [1], [1, 2], [0, 1, 2]])
def test_all_ranks_raise_what_the_first_has_raised(
    tmp_path: Path, failing: list[int], kind: type[BaseException]
) -> None:
    """And each what it has raised itself, unless that was a CheckpointError."""

    def run(collectives: ThreadCollectives) -> str:
        rank = collectives.rank
        try:
            with together(collectives, tmp_path, "seen by rank"):
                if rank in failing:
                    raise kind(f"file{rank}", "is full")
        except CheckpointError as error:
            own = kind is CheckpointError and rank in failing
            assert isinstance(error.__cause__, CheckpointError) == own
            return str(error)
        except kind:
            return "its own"
        return "passed"

    words = "passed"
    if failing:
        first = failing[0]
        why = f"{tmp_path}: {kind.__name__}('file{first}', 'is full')"
        if kind is CheckpointError:
            why = f"file{first}: is full"
        words = f"{why} (seen by rank {first} on {socket.gethostname()})"
    kept = [] if kind is CheckpointError else failing
    assert run_ranks(3, run) == ["its own" if rank in kept else words for rank in range(3)]

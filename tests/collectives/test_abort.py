"""A rank that fails takes the job down: its message, a status other than zero, and no hang."""

from __future__ import annotations

import mpirun
import process
import pytest

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "ZeroDivisionError: as asked"),
        ("hook", "ZeroDivisionError: division by zero"),
        ("model", r"different models: parameter /W is float32 of shape (7, 7) on rank 0"),
        ("scaling", "loss scale: None on ranks 0 and 2, 1 on rank 1"),
    ],
)
def test_an_exception_on_one_rank_ends_the_job(how: str, message: str) -> None:
    job = mpirun.command(3, mpirun.PROGRAMS / "failing.py", how)
    status, output = process.run(*job, env=mpirun.environment(), limit=60)
    assert status != 0
    assert message in output
    # The first rank that fails ends the others; of several that fail any may be the first.
    if how in ("raise", "hook"):
        assert "smorms3_dist: rank 1 failed; ending the job" in output
    assert "failed; ending the job" in output
    assert "not reached" not in output


def test_a_forked_child_that_fails_ends_the_job() -> None:
    job = mpirun.command(3, mpirun.PROGRAMS / "failing.py", "fork")
    status, output = process.run(*job, env=mpirun.environment(), limit=60)
    assert status != 0
    assert "ZeroDivisionError: in the child" in output
    assert "a forked child of rank 1 failed; ending the job" in output
    assert "not reached" not in output


def test_forked_children_end_without_mpi_also_where_there_is_no_optimizer() -> None:
    """MPI's own end of a process would wait for ever in a child, and its parent with it."""
    job = mpirun.command(2, "-m", "smorms3_dist", mpirun.PROGRAMS / "children.py")
    status, output = process.run(*job, env=mpirun.environment(), limit=60)
    assert status != 0
    assert "the child that exits ended with 3\n" in output
    assert "words of the child\n" in output
    assert "the child that exits with words ended with 1\n" in output
    assert "the child that comes to the end ended with 0\n" in output
    assert "ZeroDivisionError: in the child" in output
    assert "a forked child of rank 1 failed; ending the job" in output
    assert "not reached" not in output

"""A rank that fails takes the job down: its message, a status other than zero, and no hang."""

from __future__ import annotations

import mpirun
import process
import pytest

pytestmark = pytest.mark.mpi


def run_failing(*arguments: str, ranks: int = 3) -> tuple[int, str]:
    return process.run(*mpirun.command(ranks, *arguments), env=mpirun.environment(), limit=60)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "ZeroDivisionError: as asked"),
        ("hook", "ZeroDivisionError: division by zero"),
        ("model", r"different models: parameter /W is float32 of shape (7, 7) on rank 0"),
        ("scaling", "rank 1 has dynamic loss scaling"),
    ],
)
def test_an_exception_on_one_rank_ends_the_job(how: str, message: str) -> None:
    status, output = run_failing(str(mpirun.PROGRAMS / "failing.py"), how)
    assert status != 0
    assert message in output
    # The first rank that fails ends the others; of several that fail any may be the first.
    if how in ("raise", "hook"):
        assert "smorms3_dist: rank 1 failed; ending the job" in output
    assert "failed; ending the job" in output
    assert "not reached" not in output


def test_a_rank_of_a_script_under_the_runner_that_exits_ends_the_job() -> None:
    status, output = run_failing("-m", "smorms3_dist", str(mpirun.PROGRAMS / "failing.py"), "exit")
    assert status != 0
    assert "not reached" not in output


def test_a_forked_child_that_fails_ends_the_job() -> None:
    status, output = run_failing("-m", "smorms3_dist", str(mpirun.PROGRAMS / "failing.py"), "fork")
    assert status != 0
    assert "ZeroDivisionError: in the child" in output
    assert "a forked child of rank 1 failed; ending the job" in output
    assert "not reached" not in output


def test_processes_that_do_not_know_of_each_other_are_refused() -> None:
    status, output = process.run(
        *mpirun.command(1, str(mpirun.PROGRAMS / "failing.py"), "none"),
        env=mpirun.environment(PMI_SIZE="2"),
        limit=60,
    )
    assert status != 0
    assert "the launcher and the library do not match" in output

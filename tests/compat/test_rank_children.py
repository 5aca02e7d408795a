"""Workers of a rank's iterator: forked if nothing else is said, and in any case without MPI."""

from __future__ import annotations

from pathlib import Path

import pytest
from fresh import FORK_SERVER_BY_DEFAULT, run_ranks

SCRIPTS = Path(__file__).parent / "scripts"
TOTAL = str(2 * sum(range(16)))

pytestmark = pytest.mark.mpi


def run_open(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Runs the script without a main block, as on a Python that forks no more."""
    code = f"{FORK_SERVER_BY_DEFAULT}import smorms3_dist\n"
    script = tmp_path / "script.py"
    script.write_text(code + (SCRIPTS / "rank_children.py").read_text())
    return run_ranks(tmp_path, script, *arguments)


def test_a_script_without_a_main_block_reads_by_workers_as_ever(tmp_path: Path) -> None:
    status, output = run_open(tmp_path)
    assert status == 0, output
    assert output.count(f"read {TOTAL}") == 2, output


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_its_children_end_the_job_where_they_run_its_top_level(method: str, tmp_path: Path) -> None:
    status, output = run_open(tmp_path, method)
    assert status != 0
    assert "a communicator was asked for in a child that multiprocessing has started" in output
    assert 'under `if __name__ == "__main__":`' in output
    assert f"read {TOTAL}" not in output


def test_workers_leave_mpi_alone_whatever_the_start_method(tmp_path: Path) -> None:
    script = SCRIPTS / "guarded_rank_children.py"
    methods = ["fork", "forkserver", "spawn"]
    status, output = run_ranks(tmp_path, "-m", "smorms3_dist", script, *methods)
    assert status == 0, output
    assert [output.count(f"16 read by {method}\n") for method in methods] == [2, 2, 2], output

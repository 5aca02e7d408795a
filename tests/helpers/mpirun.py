"""Runs a program of tests/programs on MPI ranks, with a time limit, and reads what it reports."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import process

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "programs"

_MARK = "report: "


def report(rank: int, **values: Any) -> None:
    """Called by a program: hands values to the test that runs it."""
    # One write: the lines of several ranks must not mix.
    sys.stdout.write(f"{_MARK}{json.dumps({'rank': rank, **values})}\n")
    sys.stdout.flush()


def command(ranks: int, *arguments: str | Path) -> list[str]:
    """The command line that runs Python with some arguments on so many ranks."""
    beside_python = Path(sys.executable).parent / "mpirun"
    launcher = str(beside_python) if beside_python.exists() else shutil.which("mpirun")
    if launcher is None:
        raise RuntimeError("mpirun is not installed; install the extra: pip install .[mpi]")
    options = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
    return [launcher, *options, "-n", str(ranks), sys.executable, *map(str, arguments)]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a program: this one's, with the package and the tests importable."""
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # Looking for libfabric's networks takes a second at each start.
    one_host = {"OMPI_MCA_btl": "^ofi"}
    path = os.pathsep.join(filter(None, paths))
    return {**os.environ, **as_root, **one_thread, **one_host, "PYTHONPATH": path, **extra}


def run_program(
    ranks: int, program: str, *arguments: str, limit: float = 240, **extra_environment: str
) -> list[dict[str, Any]]:
    """Runs a program on so many ranks and expects it to succeed.

    Returns:
        What the ranks reported, by rank.
    """
    status, output = process.run(
        *command(ranks, "-W", "error", PROGRAMS / program, *arguments),
        env=environment(**extra_environment),
        limit=limit,
    )
    assert status == 0, output
    reports = [
        json.loads(line.removeprefix(_MARK))
        for line in output.splitlines()
        if line.startswith(_MARK)
    ]
    reports.sort(key=lambda values: values["rank"])
    assert [values["rank"] for values in reports] == list(range(ranks)), output
    return reports

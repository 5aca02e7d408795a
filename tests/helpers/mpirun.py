"""Runs a program of tests/programs on MPI ranks, with a time limit, and reads what it reports."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
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


def in_worlds(sizes: Sequence[int], body: Callable[[Any], dict[str, Any]]) -> None:
    """Called by a program: lets worlds of several sizes report, of ranks that are started once.

    Worlds for which there are enough ranks run side by side. The body is called on each rank of a
    world, with ChainerMN's communicator, and returns its report.
    """
    import chainermn
    from mpi4py import MPI

    job = MPI.COMM_WORLD
    for turn in _turns(sizes, job.size):
        index = bisect.bisect(list(itertools.accumulate(turn)), job.rank)
        ranks = job.Split(index, job.rank)
        if index < len(turn):
            comm = chainermn.create_communicator("naive", mpi_comm=ranks)
            report(comm.rank, world=comm.size, **body(comm))
        job.Barrier()


def _turns(sizes: Sequence[int], ranks: int) -> Iterator[list[int]]:
    """Divides worlds into turns of at most so many ranks."""
    waiting = sorted(sizes, reverse=True)
    while waiting:
        turn: list[int] = []
        for size in list(waiting):
            if sum(turn) + size <= ranks:
                turn.append(size)
                waiting.remove(size)
        assert turn, f"there are {ranks} ranks, but a world of {waiting[0]}"
        yield turn


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
    """Runs a program that must succeed on so many ranks; returns what they reported, by rank."""
    reports, output = _run(ranks, program, *arguments, limit=limit, **extra_environment)
    assert [values["rank"] for values in reports] == list(range(ranks)), output
    return reports


@functools.cache
def run_worlds(ranks: int, program: str, *arguments: str) -> dict[int, list[dict[str, Any]]]:
    """Runs a program that calls `in_worlds`, once for all tests that ask for it.

    Returns, for each size of a world, what its ranks reported, by rank; of several reports of a
    rank all that is in any of them.
    """
    reports, output = _run(ranks, program, *arguments, limit=240)
    worlds: dict[int, dict[int, dict[str, Any]]] = {}
    for values in reports:
        worlds.setdefault(values["world"], {}).setdefault(values["rank"], {}).update(values)
    assert all(list(of_world) == list(range(size)) for size, of_world in worlds.items()), output
    return {size: list(of_world.values()) for size, of_world in worlds.items()}


def _run(
    ranks: int, program: str, *arguments: str, limit: float, **extra_environment: str
) -> tuple[list[dict[str, Any]], str]:
    """Runs a program; returns the reports, sorted by rank, and the whole output."""
    status, output = process.run(
        *command(ranks, "-W", "error", PROGRAMS / program, *arguments),
        env=environment(**extra_environment),
        limit=limit,
    )
    assert status == 0, output
    return reports_in(output), output


def reports_in(output: str) -> list[dict[str, Any]]:
    """What ranks have reported, also through smorms3-dist run; sorted by rank."""
    found = re.findall(rf"^(?:\[\d+\] )?{_MARK}(.*)$", output, re.MULTILINE)
    return sorted(map(json.loads, found), key=lambda values: values["rank"])

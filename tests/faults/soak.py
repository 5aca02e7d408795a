"""A long training that is killed and goes on, beside the same one without interruption.

Two ranks, with learning rates and hooks that change, and with checkpoints: the results are alike
bit for bit, and what a rank takes of memory, descriptors and threads does not grow from step to
step. The command, ``bash tests/faults/soak.sh``, prints the slopes.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mpirun
import numpy as np
import process

PROGRAM = Path(__file__).with_name("soaking.py")
LIMITS = {"memory": 256.0, "descriptors": 0.002, "threads": 0.002}
"""By how much each may grow in a step: a descriptor in 500. A small object takes 64 bytes."""

Reports = list[dict[str, Any]]


def job(steps: int, attempt: int, kill: int, *directories: str) -> Reports:
    """Runs trainings to their ends, or until one is killed after an iteration."""
    command = mpirun.command(2, "-m", "smorms3_dist", PROGRAM, str(steps), str(kill), *directories)
    environment = mpirun.environment(SMORMS3_RESTART_COUNT=str(attempt))
    status, output = process.run(*command, env=environment, limit=max(180, steps / 5))
    assert (status != 0) == (kill > 0), f"status {status}: {output}"
    return mpirun.reports_in(output)


def soak(steps: int, kills: Sequence[int]) -> tuple[list[Reports], str]:
    """Runs a training twice: killed after some iterations, and without interruption.

    Returns:
        What the ranks have reported of each training and job, that without interruption last; and
        what is wrong with the result.
    """
    with tempfile.TemporaryDirectory() as directory:
        killed, whole = f"{directory}/killed", f"{directory}/whole"
        jobs = [job(steps, attempt, kill, killed) for attempt, kill in enumerate(kills)]
        last = job(steps, len(kills), 0, killed, whole)
    jobs += [[r for r in last if r["training"] == path] for path in (killed, whole)]
    results = [
        [(r["rank"], r["t"], r["digest"]) for r in reports if "digest" in r]
        for reports in jobs[-2:]
    ]
    is_right = len(results[0]) == 2 and results[0] == results[1]
    return jobs, "" if is_right else f"killed: {results[0]}, without interruption: {results[1]}"


def growth(jobs: Sequence[Reports], steps: int) -> list[str]:
    """What grows in which rank by more than its limit."""
    return [
        f"rank {rank}: {name} grow by {slope:g} a step"
        for (rank, name), slope in slopes(jobs, steps).items()
        if not slope <= LIMITS[name]
    ]


def slopes(jobs: Sequence[Reports], steps: int) -> dict[tuple[int, str], float]:
    """By how much each rank grows in a step: least squares, each job with a level of its own.

    The first tenth of the steps of each job is left out: caches fill.
    """
    found = {}
    for rank in (0, 1):
        of_rank = [[r for r in reports if r["rank"] == rank and "memory" in r] for reports in jobs]
        warm = [
            [r for r in reports if r["iteration"] >= reports[0]["iteration"] + steps // 10]
            for reports in of_rank
            if reports
        ]
        for name in LIMITS:
            above = below = 0.0
            for reports in filter(None, warm):
                x = np.array([r["iteration"] for r in reports], float)
                y = np.array([r[name] for r in reports], float)
                above += float(np.dot(x - x.mean(), y))
                below += float(np.dot(x - x.mean(), x - x.mean()))
            found[rank, name] = above / below
    return found


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, metavar="N", default=20_000, help="(%(default)s)")
    parser.add_argument("--kills", type=int, metavar="N", default=4, help="(%(default)s)")
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="(%(default)s)")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    kills = sorted(draw.sample(range(1, options.steps), options.kills))
    jobs, complaint = soak(options.steps, kills)
    print(f"{options.steps} steps at 2 ranks, killed after {', '.join(map(str, kills))}")
    for (rank, name), slope in slopes(jobs, options.steps).items():
        print(f"rank {rank}: {slope:10.4f} {name} a step, at most {LIMITS[name]:g}")
    complaints = [*filter(None, [complaint]), *growth(jobs, options.steps)]
    for complaint in complaints:
        print("FAILED", complaint)
    return int(bool(complaints))


if __name__ == "__main__":
    sys.exit(main())

"""Random faults on short trainings: each ends with the exact right result or with a named error.

A seed draws a fault: what goes wrong, on which rank, before which step, in which training. By
threads many are tried in little time; by real ranks those, too, that end a process. The command,
``bash tests/faults/run.sh``, prints how many of each kind were tried, and the seeds that failed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import re
import shlex
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from smorms3_dist import CheckpointError

import disks
import mpirun
import numpy as np
import process
import pytest
from acts import Left, Planted
from kinds import BY_RANKS, BY_THREADS, KINDS, Fault, Run, kill
from rank_threads import run_ranks

PROGRAM = Path(__file__).with_name("ranks.py")
SECONDS_BY_THREADS = 30.0
SECONDS_BY_RANKS = 90.0

Outcome = dict[str, Any]


def outcome(fault: Fault, comm: Any, directory: Path) -> Outcome:
    """How the training ends on one rank: with a digest, with words, or by leaving."""
    try:
        with np.errstate(all="ignore"):
            return {"digest": Run(fault, comm, directory).train()}
    except threading.BrokenBarrierError:
        raise
    except (RuntimeError, CheckpointError) as error:
        return {"said": str(error)}
    except Left:
        return {"left": True}


def right_digest(fault: Fault) -> str:
    """What the same training comes to without the fault."""
    left_out = fault.step if KINDS[fault.kind].left_out else 0
    # Parameters do not depend on where gradients are whole, but for norms.
    gradients = fault.gradients if fault.hooks == "clipping" else "auto"
    same = replace(fault, seed=0, kind="nothing", rank=0, step=0, gradients=gradients)
    return _right_digest(replace(same, left_out=left_out))


@functools.cache
def _right_digest(fault: Fault) -> str:
    (digest,) = {
        ended["digest"]
        for ended in run_ranks(fault.world, lambda comm: outcome(fault, comm, Path()))
    }
    return str(digest)


def complaint(fault: Fault, ended: dict[int, Outcome]) -> str:
    """What is wrong with how the ranks have ended; nothing if all is right."""
    kind = KINDS[fault.kind]
    for rank in range(fault.world):
        found = ended.get(rank, {})
        if kind.says is None:
            is_right = found == {"digest": right_digest(fault)}
        elif kind.who == "others" and rank == fault.rank:
            is_right = found == {"left": True}
        else:
            is_right = is_said(fault, found.get("said", ""))
        if not is_right:
            return f"rank {rank}: {found or 'nothing'}"
    return ""


def is_said(fault: Fault, text: str) -> bool:
    """Whether a text names the fault."""
    says = (KINDS[fault.kind].says or "").replace("{rank}", str(fault.rank))
    return re.search(says, text, re.DOTALL) is not None and bool(text)


def by_threads(fault: Fault) -> str:
    """Tries a fault on ranks that are threads; returns the complaint.

    Those of which jobs die are tried on forked ranks.
    """
    with tempfile.TemporaryDirectory() as directory:
        if KINDS[fault.kind].attempts > 1:
            program = [sys.executable, PROGRAM, str(fault.seed), directory, "--fork"]
            return complaint_of_jobs(fault, [run(program)])
        try:
            ended = run_ranks(
                fault.world,
                lambda comm: outcome(fault, comm, Path(directory)),
                timeout=SECONDS_BY_THREADS,
            )
        except Exception as error:
            planted = isinstance(error, Planted) and KINDS[fault.kind].who == "it"
            return "" if planted else f"{type(error).__name__}: {error}"
    return complaint(fault, dict(enumerate(ended)))


def by_ranks(fault: Fault) -> str:
    """Tries a fault on processes, under mpirun or smorms3-dist run; returns the complaint."""
    kind, jobs = KINDS[fault.kind], []
    with tempfile.TemporaryDirectory() as directory:
        arguments = [PROGRAM, str(fault.seed), directory]
        if fault.seed % 4 == 0:
            options = ["-n", str(fault.world), "--max-restarts", str(kind.attempts - 1)]
            job = [sys.executable, "-m", "smorms3_dist", "run", *options, *arguments]
            attempts = 1
        else:
            job = [*mpirun.command(fault.world, "-m", "smorms3_dist", *arguments)]
            attempts = kind.attempts
        if kind.small_disk:
            job = disks.mounting(Path(directory), f"exec {shlex.join(map(str, job))}")
        for attempt in range(attempts):
            jobs.append(run(job, SMORMS3_RESTART_COUNT=str(attempt)))
    return complaint_of_jobs(fault, jobs)


def run(command: Sequence[str | Path], **variables: str) -> tuple[int, str]:
    """Runs a job; returns its status and what it has printed."""
    try:
        return process.run(*command, env=mpirun.environment(**variables), limit=SECONDS_BY_RANKS)
    except pytest.fail.Exception as error:
        return -1, str(error)


def complaint_of_jobs(fault: Fault, jobs: Sequence[tuple[int, str]]) -> str:
    """What is wrong with how the jobs have ended; all but the last one have to be killed."""
    *killed, (status, output) = jobs
    for other_status, other in killed:
        if other_status == 0 or re.search(kill, other) is None:
            return f"status {other_status}: {other}"
    if KINDS[fault.kind].who == "it":
        is_right = status != 0 and is_said(fault, output)
        return "" if is_right else f"status {status}: {output}"
    ended = {values.pop("rank"): values for values in mpirun.reports_in(output)}
    found = complaint(fault, ended) or ("" if status == 0 else f"status {status}")
    return f"{found}\n{output}" if found else ""


def campaign(
    how: Callable[[Fault], str], faults: Iterable[Fault], at_once: int = 1
) -> tuple[Counter[str], dict[Fault, str]]:
    """Tries faults; returns how many of each kind, and the complaints."""
    faults = list(faults)
    with ThreadPoolExecutor(at_once) as pool:
        found = dict(zip(faults, pool.map(how, faults), strict=True))
    return Counter(fault.kind for fault in faults), {f: text for f, text in found.items() if text}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    parser.add_argument("--threads", **number, default=1000, help="runs by threads (%(default)s)")
    parser.add_argument("--ranks", **number, default=150, help="runs by real ranks (%(default)s)")
    parser.add_argument("--seed", **number, default=0, help="the first seed (%(default)s)")
    parser.add_argument("--at-once", **number, default=1, help="jobs of real ranks at once (1)")
    parser.add_argument("--only", metavar="TEXT", default="", help="kinds with it in their names")
    options = parser.parse_args()
    logging.disable()
    warnings.simplefilter("ignore")
    mounts = disks.can_be_mounted()
    if options.ranks and not mounts:
        print("no disk can be mounted here: none is full in what real ranks try")
    failed = False
    for name, how, runs, kinds, at_once in (
        ("threads", by_threads, options.threads, BY_THREADS, 1),
        ("real ranks", by_ranks, options.ranks, BY_RANKS, options.at_once),
    ):
        drawn = (Fault.drawn(seed, kinds) for seed in itertools.count(options.seed))
        possible = (
            fault
            for fault in drawn
            if options.only in fault.kind and (mounts or not KINDS[fault.kind].small_disk)
        )
        counts, complaints = campaign(how, itertools.islice(possible, runs), at_once)
        print(f"{runs} runs by {name}, {len(complaints)} failed")
        for kind in kinds if runs else ():
            if options.only in kind:
                print(f"{counts[kind]:6} {kind}")
        for fault, text in complaints.items():
            print(f"FAILED {fault}\n    {text}")
        failed = failed or bool(complaints)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

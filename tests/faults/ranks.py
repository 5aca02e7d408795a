"""The fault of a seed on processes: each rank reports how it has ended.

ranks.py SEED DIRECTORY             on MPI's ranks
ranks.py SEED DIRECTORY --fork      on forked ranks without MPI, job after job
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from smorms3_dist.kernels import selection

from campaign import outcome
from forked import run_forked
from kinds import BY_RANKS, BY_THREADS, KINDS, Fault
from mpirun import report


def be_rank(comm: Any) -> None:
    report(comm.rank, **outcome(fault, comm, Path(sys.argv[2])))


warnings.simplefilter("ignore")
forked = sys.argv[3:] == ["--fork"]
fault = Fault.drawn(int(sys.argv[1]), BY_THREADS if forked else BY_RANKS)
if forked:
    # To load the compiled one takes longer than these trainings do; the results are the same.
    selection.compiled_update = lambda dtype, rank=0: None
    for attempt in range(KINDS[fault.kind].attempts):
        os.environ["SMORMS3_RESTART_COUNT"] = str(attempt)
        ended = run_forked(fault.world, be_rank)
        is_last = attempt == KINDS[fault.kind].attempts - 1
        if set(ended) != {0 if is_last else -signal.SIGKILL}:
            sys.exit(f"attempt {attempt} has ended with {ended}")
else:
    from mpi4py import MPI

    # Ranks outnumber cores here, where a thread beside each of them takes its time.
    fault = dataclasses.replace(fault, overlap=False)
    be_rank(MPI.COMM_WORLD)

"""The fault of a seed on MPI ranks: each reports how it has ended."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

from campaign import outcome
from kinds import BY_RANKS, Fault
from mpi4py import MPI
from mpirun import report

warnings.simplefilter("ignore")
fault = Fault.drawn(int(sys.argv[1]), BY_RANKS)
comm = MPI.COMM_WORLD
report(comm.rank, **outcome(fault, comm, Path(sys.argv[2])))

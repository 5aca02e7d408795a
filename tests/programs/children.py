"""Rank 1 forks children, which end each in its own way, while rank 0 waits; the last one fails."""

import os
import sys

from mpi4py import MPI


def forks(what: str) -> bool:
    """Whether this is the child; its parent tells how it has ended."""
    child = os.fork()
    if child != 0:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(f"the child that {what} ended with {status}", flush=True)
    return child == 0


if MPI.COMM_WORLD.rank == 0:
    MPI.COMM_WORLD.recv()
elif forks("exits"):
    sys.exit(3)
elif forks("exits with words"):
    sys.exit("words of the child")
elif forks("comes to the end"):
    pass
elif forks("fails"):
    raise ZeroDivisionError("in the child")
else:
    print("not reached")

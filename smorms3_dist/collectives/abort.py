"""Ends the whole MPI job when one rank fails, so that the others do not wait for it for ever."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from types import TracebackType

from smorms3_dist.phases import of_process
from smorms3_dist.rank_page import leave, page
from smorms3_dist.timeline.rank_timeline import flush

_installed = False


def end_job_on_exception(rank: int, pid: int | None = None) -> None:
    """Lets an uncaught exception of this process end all ranks, after its traceback, with status 1.

    The hook that stood before is still called, to print. Calling this again changes nothing. An
    exit by ``sys.exit(status)`` does not pass here: scripts started by ``python -m smorms3_dist``
    are covered for that, too. A child that the rank has forked, and which MPI does not know, ends
    it by a signal, and by that the job.

    Args:
        rank: The rank.
        pid: The process that is the rank; this one, unless a child of it says otherwise.
    """
    global _installed
    if _installed:
        return
    _installed = True
    print_exception = sys.excepthook
    pid = pid or os.getpid()

    def abort(
        kind: type[BaseException], value: BaseException, traceback: TracebackType | None
    ) -> None:
        from mpi4py import MPI

        page.failed = 1
        whose = "" if os.getpid() == pid else "a forked child of "
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                print_exception(kind, value, traceback)
        finally:
            said.write(f"smorms3_dist: {whose}rank {rank} failed; ending the job\n")
            try:
                # One write: mpirun puts its own notice between two of them, within a line.
                sys.stderr.write(said.getvalue())
                sys.stdout.flush()
                sys.stderr.flush()
                if os.getpid() == pid:
                    flush(of_process)
                leave()
            finally:
                if os.getpid() != pid:
                    os.kill(pid, signal.SIGTERM)
                    os._exit(1)
                if MPI.Is_initialized() and not MPI.Is_finalized():
                    MPI.COMM_WORLD.Abort(1)

    sys.excepthook = abort

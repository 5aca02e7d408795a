"""What NCCL does is waited for in bounded time, and asked for errors.

A rank that dies leaves NCCL's operations of the others waiting for ever.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from smorms3_dist.device.memory import CudaMemory, GpuError

ABORT_LIMIT_S = 10.0
"""Seconds that NCCL may take to give up a communicator; an abort can itself hang."""

_POLL_S = 0.0001
_NCCL_IN_PROGRESS = 7


class NcclError(RuntimeError):
    """A collective that failed, or did not end in time."""


class BoundedWait:
    """Waits for what a rank has given to NCCL.

    Args:
        rank: The rank.
        memory: The memory of its GPU.
        limit_s: Seconds that it may take.
    """

    def __init__(self, rank: int, memory: CudaMemory, limit_s: float) -> None:
        self._rank = rank
        self._memory = memory
        self._limit_s = limit_s
        import cupy

        self._error = cupy.cuda.nccl.NcclError

    def wait_for(self, event: Any, comm: Any) -> None:
        """Lets the host wait for an event after collectives of a communicator.

        Raises:
            NcclError: If the GPU or NCCL reports an error, or it does not happen in time. The
                communicator is given up then.
        """
        deadline = time.monotonic() + self._limit_s
        try:
            while not self._memory.has_happened(event):
                self._check_for_error(comm)
                if time.monotonic() > deadline:
                    raise self._given_up(
                        comm,
                        f"did not end within {self._limit_s:g} s: another rank has died or is "
                        "elsewhere",
                    )
                time.sleep(_POLL_S)
        except GpuError as error:
            raise self._given_up(comm, f"cannot end, since {error}") from error
        self._check_for_error(comm)

    def _check_for_error(self, comm: Any) -> None:
        try:
            comm.check_async_error()
        except KeyError as error:
            # CuPy has no words for NCCL's newest statuses.
            status = error.args[0]
            if status != _NCCL_IN_PROGRESS:
                raise self._given_up(comm, f"failed with NCCL's status {status}") from error
        except self._error as error:
            raise self._given_up(comm, f"failed: {error}") from error

    def _given_up(self, comm: Any, what: str) -> NcclError:
        abort(comm)
        return NcclError(
            f"rank {self._rank}: a collective on the GPU {what}. The first rank that failed says "
            "why; NCCL_DEBUG=WARN shows NCCL's own messages"
        )


def abort(comm: Any) -> None:
    """Gives a communicator up, with all that is under way in it, in bounded time."""
    thread = threading.Thread(target=comm.abort, daemon=True)
    thread.start()
    thread.join(ABORT_LIMIT_S)

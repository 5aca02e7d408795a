"""Reduce-scatter, all-gather and broadcast of flat arrays: one protocol, several transports."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from smorms3_dist.collectives.base import Collectives

if TYPE_CHECKING:
    from smorms3_dist.memory import Memory

_on_gpu: weakref.WeakKeyDictionary[Collectives, Collectives] = weakref.WeakKeyDictionary()


def connect(communicator: Any) -> Collectives:
    """Makes the collectives for what the user calls a communicator.

    Args:
        communicator: A ChainerMN communicator, another object with ChainerMN's communicator
            interface, a bare mpi4py communicator, or `Collectives`, which are taken as they are.

    Returns:
        The collectives over that communicator. Over MPI, an uncaught exception of one rank ends the
        job from now on (`smorms3_dist.collectives.failure`).

    Raises:
        TypeError: If the object is none of these.
        RuntimeError: If a launcher started several processes that MPI does not know of each other.
    """
    if isinstance(communicator, Collectives):
        return communicator
    comm = getattr(communicator, "mpi_comm", communicator)
    if _is_mpi4py(comm):
        from smorms3_dist.collectives.failure import end_job_on_exception
        from smorms3_dist.collectives.mpi import MpiCollectives

        collectives = MpiCollectives(comm)
        if collectives.size > 1:
            end_job_on_exception(collectives.rank)
        return collectives
    from smorms3_dist.collectives.chainermn import REQUIRED_METHODS, CommunicatorCollectives

    missing = [name for name in REQUIRED_METHODS if not callable(getattr(communicator, name, None))]
    if not missing:
        return CommunicatorCollectives(communicator)
    raise TypeError(
        f"{communicator!r} is not a communicator: neither of ChainerMN's interface (it lacks "
        f"{', '.join(missing)}) nor an mpi4py intracommunicator. Pass "
        "chainermn.create_communicator('naive') or mpi4py.MPI.COMM_WORLD."
    )


def on_memory(host: Collectives | None, communicator: Any, memory: Memory) -> Collectives:
    """Gives the collectives for arrays in some memory.

    Args:
        host: Those on host memory, over the same ranks.
        communicator: What the user gave as communicator.
        memory: Where the arrays are.

    Returns:
        ``host``; for a GPU, collectives over NCCL if there is NCCL, else through host memory.

    Raises:
        RuntimeError: Without collectives.
    """
    if host is None:
        raise RuntimeError("there is no communicator")
    if memory.launcher is None:
        return host
    known = _on_gpu.get(host)
    if known is None:
        from smorms3_dist.collectives.nccl import NcclCollectives
        from smorms3_dist.collectives.staged import StagedCollectives

        known = (
            NcclCollectives(host, nccl_comm=getattr(communicator, "nccl_comm", None))
            if _has_nccl()
            else StagedCollectives(host, memory)
        )
        _on_gpu[host] = known
    return known


def _has_nccl() -> bool:
    from cupy.cuda import nccl

    return bool(nccl.available)


def _is_mpi4py(comm: Any) -> bool:
    # Asked by name, so that mpi4py (and MPI_Init with it) is not imported on behalf of others.
    return any(
        kind.__module__ == "mpi4py.MPI" and kind.__name__ == "Intracomm"
        for kind in type(comm).__mro__
    )

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


def on_memory(
    host: Collectives, memory: Memory, communicator: Any, communication_dtype: str | None
) -> Collectives:
    """Gives the collectives for arrays in some memory.

    Args:
        host: Those on host memory, over the same ranks.
        memory: Where the arrays are.
        communicator: What the user gave as communicator.
        communication_dtype: The dtype in which gradients are sent over NCCL, or ``None``.

    Returns:
        ``host``; for GPUs, collectives over NCCL if every rank has NCCL and a GPU of its own, else
        through host memory. Collective.

    Raises:
        ValueError: If a communication dtype is given, but NCCL is not used.
    """
    if memory.launcher is None:
        _refuse_dtype(communication_dtype, "the model is in host memory")
        return host
    known = _on_gpu.get(host)
    if known is None:
        from smorms3_dist.collectives.nccl import NcclCollectives
        from smorms3_dist.collectives.staged import StagedCollectives

        if _nccl_works(host, memory):
            ready = getattr(communicator, "nccl_comm", None)
            known = NcclCollectives(host, communication_dtype, nccl_comm=ready)
        else:
            _refuse_dtype(communication_dtype, "NCCL is missing, or ranks share a GPU")
            known = StagedCollectives(host, memory)
        _on_gpu[host] = known
    return known


def _refuse_dtype(communication_dtype: str | None, reason: str) -> None:
    if communication_dtype is not None:
        raise ValueError(
            f"communication_dtype={communication_dtype!r} is for NCCL, but {reason}; leave it out"
        )


def _nccl_works(host: Collectives, memory: Memory) -> bool:
    from cupy.cuda import nccl

    everybody = host.all_gather_object((bool(nccl.available), memory.place()))
    places = {place for _, place in everybody}
    return all(available for available, _ in everybody) and len(places) == host.size


def _is_mpi4py(comm: Any) -> bool:
    # Asked by name, so that mpi4py (and MPI_Init with it) is not imported on behalf of others.
    return any(
        kind.__module__ == "mpi4py.MPI" and kind.__name__ == "Intracomm"
        for kind in type(comm).__mro__
    )

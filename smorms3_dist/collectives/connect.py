"""Which collectives serve a communicator, and which of them arrays in some memory.

A transport is imported when it is chosen, and with it what it needs: mpi4py starts MPI.
"""

from __future__ import annotations

import logging
from typing import Any

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.device.gpu_check import how_to_install
from smorms3_dist.device.memory import CudaMemory, Memory
from smorms3_dist.timeline.rank_timeline import start_timeline
from smorms3_dist.waiting import watch

_logger = logging.getLogger(__name__)


def connect(communicator: Any) -> Collectives:
    """Makes the collectives for what the user calls a communicator.

    That is a ChainerMN communicator, another object with ChainerMN's communicator interface, a bare
    mpi4py communicator, or `Collectives`, which are taken as they are. Over MPI, an uncaught
    exception of one rank ends the job from now on (`smorms3_dist.collectives.abort`).

    Raises:
        TypeError: If the object is none of these.
        RuntimeError: If a launcher started several processes that MPI does not know of each other.
        ValueError: If ``SMORMS3_STALL_WARNING`` is no number of seconds, or the directory in
            ``SMORMS3_TIMELINE`` cannot be written to.
    """
    if isinstance(communicator, Collectives):
        return communicator
    comm = getattr(communicator, "mpi_comm", communicator)
    if _is_mpi4py(comm):
        from smorms3_dist.collectives.abort import end_job_on_exception
        from smorms3_dist.collectives.mpi import MpiCollectives, world_rank

        collectives = MpiCollectives(comm)
        if collectives.size > 1:
            end_job_on_exception(collectives.rank)
        # Also where the communicator is of a part of the ranks, each has a file of its own.
        start_timeline(collectives.phases, world_rank())
        return collectives
    from smorms3_dist.collectives.chainermn import REQUIRED_METHODS, CommunicatorCollectives

    missing = [name for name in REQUIRED_METHODS if not callable(getattr(communicator, name, None))]
    if not missing:
        made = CommunicatorCollectives(communicator)
        if made.size > 1:
            watch(made.wait)
        start_timeline(made.phases, made.rank)
        return made
    raise TypeError(
        f"{communicator!r} is not a communicator: neither of ChainerMN's interface (it lacks "
        f"{', '.join(missing)}) nor an mpi4py intracommunicator. Pass "
        "chainermn.create_communicator('naive') or mpi4py.MPI.COMM_WORLD."
    )


def on_memory(
    host: Collectives,
    memory: Memory,
    communicator: Any,
    communication_dtype: str | None,
    gather_dtype: str | None = None,
    transport: str = "auto",
) -> Collectives:
    """Gives the collectives for arrays in some memory. Collective.

    That is ``host``, if the arrays are in host memory. For GPUs, collectives over NCCL if every
    rank has NCCL and a GPU of its own; else over MPI, if on every rank that confirms to take
    pointers to the memory of GPUs; else through host memory. Rank 0 says which, and why: what is
    not NCCL is slower, and a warning. With the transport ``'nccl'`` it is an error.

    Raises:
        ValueError: If a communication dtype is given, but a model on GPUs does not use NCCL; or a
            dtype to gather in, but the model is on GPUs; or NCCL, but it is not; or ranks differ in
            one of these, or in whether their model is on a GPU.
        RuntimeError: If NCCL was asked for, and a rank cannot use it.
    """
    on_gpu = isinstance(memory, CudaMemory)
    told = {
        "communication_dtype": communication_dtype,
        "gather_dtype": gather_dtype,
        "transport": transport,
    }
    everybodys = host.all_gather_object((on_gpu, told, memory.location()))
    for rank, (theirs_on_gpu, theirs, _) in enumerate(everybodys):
        if theirs_on_gpu != everybodys[0][0]:
            where = [f"on {'a GPU' if there else 'the host'}" for there, _, _ in everybodys]
            raise ValueError(
                f"the model of rank 0 is {where[0]}, that of rank {rank} {where[rank]}; move it to "
                "the same kind of device on all ranks"
            )
        for option, value in everybodys[0][1].items():
            if theirs[option] != value:
                raise ValueError(
                    f"{option} is {value!r} on rank 0 and {theirs[option]!r} on rank {rank}; give "
                    "all ranks the same"
                )
    if not isinstance(memory, CudaMemory):
        if transport == "nccl":
            raise ValueError(
                "transport='nccl' is for models on GPUs, and this one is in host memory; move it "
                "to a GPU, or leave the transport out"
            )
        return host
    if gather_dtype is not None:
        raise ValueError(
            f"gather_dtype={gather_dtype!r} is for models in host memory, but this one is on a "
            "GPU; leave it out"
        )
    locations = [location for _, _, location in everybodys]
    key = (tuple(locations), communication_dtype, transport)
    if key not in host.on_devices:
        host.on_devices[key] = _on_gpu(
            host, memory, communicator, communication_dtype, locations, transport
        )
    return host.on_devices[key]


def _on_gpu(
    host: Collectives,
    memory: CudaMemory,
    communicator: Any,
    communication_dtype: str | None,
    locations: list[Any],
    transport: str,
) -> Collectives:
    """Chooses among the transports for the memory of GPUs; says why, on rank 0."""

    def say(level: int, words: str) -> None:
        if host.rank == 0:
            _logger.log(level, "arrays on GPUs go %s", words)

    without_nccl = _without_nccl(host, locations)
    if without_nccl is None:
        from smorms3_dist.collectives.nccl import NcclCollectives

        ready = getattr(communicator, "nccl_comm", None)
        say(logging.INFO, "over NCCL: every rank has it, and a GPU of its own")
        return NcclCollectives(host, memory, communication_dtype, nccl_comm=ready)
    if transport == "nccl":
        raise RuntimeError(f"transport='nccl' was asked for, but {without_nccl}")
    _refuse_dtype(communication_dtype, without_nccl)
    without_cuda = _without_cuda_aware_mpi(host)
    if without_cuda is None:
        from smorms3_dist.collectives.cuda_aware import CudaAwareCollectives
        from smorms3_dist.collectives.mpi import MpiCollectives

        assert isinstance(host, MpiCollectives)
        say(logging.WARNING, f"over MPI, which takes their pointers: {without_nccl}")
        return CudaAwareCollectives(host, memory)
    from smorms3_dist.collectives.through_host import ThroughHostCollectives

    say(logging.WARNING, f"through host memory: {without_nccl}, and {without_cuda}")
    return ThroughHostCollectives(host, memory)


def _refuse_dtype(communication_dtype: str | None, reason: str) -> None:
    if communication_dtype is not None:
        raise ValueError(
            f"communication_dtype={communication_dtype!r} on GPUs is for NCCL, but {reason}; leave "
            "it out"
        )


def _without_nccl(host: Collectives, locations: list[Any]) -> str | None:
    """Why NCCL cannot be used, if it cannot. Collective."""
    import cupy

    remedy = None if cupy.cuda.nccl.available else how_to_install()
    for rank, theirs in enumerate(host.all_gather_object(remedy)):
        if theirs is not None:
            return f"NCCL is missing on rank {rank} ({theirs})"
    for rank, location in enumerate(locations):
        if location in locations[:rank]:
            return f"ranks {locations.index(location)} and {rank} share a GPU, which NCCL refuses"
    return None


def _without_cuda_aware_mpi(host: Collectives) -> str | None:
    """Why MPI cannot be given pointers to the memory of GPUs, if it cannot. Collective."""
    from smorms3_dist.collectives.cuda_aware import is_cuda_aware
    from smorms3_dist.collectives.mpi import MpiCollectives

    if not isinstance(host, MpiCollectives):
        return "the communicator is not MPI's own"
    for rank, aware in enumerate(host.all_gather_object(is_cuda_aware())):
        if not aware:
            return f"the MPI library of rank {rank} does not take pointers to the memory of GPUs"
    return None


def _is_mpi4py(comm: Any) -> bool:
    # Asked by name, so that mpi4py (and MPI_Init with it) is not imported on behalf of others.
    return any(
        kind.__module__ == "mpi4py.MPI" and kind.__name__ == "Intracomm"
        for kind in type(comm).__mro__
    )

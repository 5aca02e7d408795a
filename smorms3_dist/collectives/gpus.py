"""Which GPU a rank uses."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from typing import Any

from smorms3_dist.collectives.connect import connect
from smorms3_dist.device.forks import tell_of_forks
from smorms3_dist.device.gpu_check import Missing, count_gpus, missing_for_gpu
from smorms3_dist.device.memory import location_of_gpu, running_host

_logger = logging.getLogger(__name__)

LOCAL_RANK_VARIABLES = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "SLURM_LOCALID",
    "MPI_LOCALRANKID",
    "MV2_COMM_WORLD_LOCAL_RANK",
    "PALS_LOCAL_RANKID",
    "FLUX_TASK_LOCAL_ID",
    "JSM_NAMESPACE_LOCAL_RANK",
)
"""Where launchers say which of the ranks of its host a process is: Open MPI, Slurm, Intel MPI and
MPICH, MVAPICH, PALS, Flux, jsrun."""


def use_gpu(communicator: Any, allow_sharing: bool = False) -> int:
    """Chooses the GPU of this rank, and makes it the current one. All ranks call this together.

    It is that of ChainerMN's ``intra_rank``, by which the ranks of a host are counted, also where
    the launcher numbers them in another order. Where the communicator has some of a host's ranks
    only, it is the one of the launcher's number. To be called before the model is made, and before
    NCCL is used.

    Args:
        communicator: As for `create_multi_node_optimizer`.
        allow_sharing: Whether several ranks may use one GPU. NCCL does not work then.

    Returns:
        The id of the GPU, as ``chainer.backends.cuda.get_device_from_id`` takes it.

    Raises:
        RuntimeError: If a host has no usable GPU, or fewer than ranks, naming the ranks.
    """
    collectives = connect(communicator)
    host, name = running_host(), socket.gethostname()
    mine = local_rank(os.environ)
    everybodys = collectives.all_gather_object((host, mine))
    numbers = [number for there, number in everybodys if there == host]
    if mine is None or set(numbers) == set(range(len(numbers))):
        mine = [there for there, _ in everybodys[: collectives.rank]].count(host)
    chosen, trouble = _choose(mine)
    location = None if trouble else location_of_gpu(chosen)
    locations = collectives.all_gather_object((location, trouble and f"{name}: {trouble}"))
    for rank, (_, problem) in enumerate(locations):
        if problem:
            raise RuntimeError(
                f"rank {rank} cannot use a GPU of {problem} To train on CPUs, do not call use_gpu()"
            )
    if not allow_sharing:
        for other, (there, _) in enumerate(locations[: collectives.rank]):
            if there == location:
                raise RuntimeError(
                    f"ranks {other} and {collectives.rank} would share GPU {chosen} of {name}. "
                    "Start no more ranks than GPUs on a host, or pass allow_sharing=True (they "
                    "then communicate through host memory, not NCCL)"
                )
    if collectives.rank == 0 and _sees_one_of_several(len(numbers), os.environ):
        _logger.warning(
            "each rank sees one GPU of its host only, which Slurm gives it (--gpus-per-task or "
            "--gpu-bind): GPUs may then not reach each other's memory, and NCCL be slower. Ask for "
            "--gpus-per-node=N with --gpu-bind=none"
        )
    tell_of_forks(collectives.rank)
    return chosen


def _sees_one_of_several(local_size: int, environment: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in environment and local_size > 1 and count_gpus() == 1


def _choose(number: int) -> tuple[int, Missing | None]:
    """Makes a GPU the current one; returns its id, and what is missing to use it."""
    # Not by a look at the current GPU, which is the first one for all ranks: half a gigabyte of it
    # would be each rank's for its context.
    count = count_gpus()
    if isinstance(count, Missing):
        return 0, count
    import cupy

    # Some launchers show each rank one GPU, its own.
    chosen = number % count
    cupy.cuda.Device(chosen).use()
    return chosen, missing_for_gpu()


def local_rank(environment: Mapping[str, str]) -> int | None:
    """Which of the ranks of its host a process is, from 0, if its launcher says."""
    for variable in LOCAL_RANK_VARIABLES:
        value = environment.get(variable, "")
        if value.isdigit():
            return int(value)
    return None

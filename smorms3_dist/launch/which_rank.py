"""Which rank a process is, by the environment that its MPI launcher gives it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_FAMILIES = (
    # Open MPI's mpirun; srun with PMIx or PMI-2; MPICH's mpirun.
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


class WhichRank(NamedTuple):
    """One of the ranks of a job, and of those of its host, as Slurm or itself calls it."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str


def which_rank(environment: Mapping[str, str] = os.environ) -> WhichRank:
    """Which rank this process is; a `LookupError` if no launcher that is known has started it."""
    host = environment.get("SLURMD_NODENAME") or socket.gethostname()
    for rank, size, local_rank, local_size in _FAMILIES:
        if rank in environment and size in environment:
            if rank == "SLURM_PROCID" and not {"PMIX_RANK", "PMI_RANK"} & set(environment):
                # srun without PMIx: MPI does not find the others.
                return WhichRank(0, 1, 0, 1, host)
            return WhichRank(
                int(environment[rank]),
                int(environment[size]),
                int(environment.get(local_rank, 0)),
                _local_size(environment.get(local_size, "1"), environment.get("SLURM_NODEID", "0")),
                host,
            )
    raise LookupError(
        "this process was not started by mpirun or srun: no variable says which rank it is"
    )


def gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """The number of NVIDIA GPUs that this process may use."""
    found = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.iterdir())
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    return min(found, sum(bool(name.strip()) for name in visible.split(",")))


def _local_size(text: str, node: str) -> int:
    """Reads a number of ranks, or Slurm's list of them by node, such as ``2(x3),1``."""
    parts = [part.partition("(x")[::2] for part in text.split(",")]
    counts = [int(number) for number, times in parts for _ in range(int(times.rstrip(")") or 1))]
    return counts[min(int(node), len(counts) - 1)]

"""Ranks that mpirun has started, for programs that run Chainer."""

from __future__ import annotations

from smorms3_dist.bench.clock import Ranks

import chainer
import chainermn
import mpi4py


def communicator(size: int) -> chainermn.CommunicatorBase:
    """The communicator of all ranks, of which there must be so many."""
    made = chainermn.create_communicator("naive")
    if made.size != size:
        raise SystemExit(
            f"mpirun was asked for {size} ranks, but MPI knows of {made.size}: "
            "mpirun and the MPI library that mpi4py loads do not belong together"
        )
    return made


def ranks(of: chainermn.CommunicatorBase) -> Ranks:
    """What a measurement needs of a communicator."""
    comm = of.mpi_comm
    return Ranks(comm.rank, comm.Barrier, comm.allgather)


def versions() -> dict[str, str]:
    """The versions of the software."""
    from mpi4py import MPI

    return {
        "Chainer": chainer.__version__,
        # The rest of the text names the machine that built the library.
        "MPI": MPI.Get_library_version().split(",")[0].splitlines()[0],
        "mpi4py": mpi4py.__version__,
    }

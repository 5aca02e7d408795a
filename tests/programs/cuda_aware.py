"""Collectives on arrays of the stand-in for CuPy over real MPI, with a library that "knows CUDA".

First the libraries of all ranks do, then that of the last rank does not.
"""

import logging
import sys
from typing import Any

import smorms3_dist  # noqa: F401  (patches Chainer)
from smorms3_dist.collectives import base, cuda_aware, through_host
from smorms3_dist.collectives.connect import connect, on_memory
from smorms3_dist.device.memory import CudaMemory

import device_checks
import fake_cupy
import numpy as np
from mpi4py import MPI
from mpirun import report

comm = MPI.COMM_WORLD
cupy = fake_cupy.module()
# Ranks share the one GPU; a rank alone has it for itself.
cupy.cuda.nccl.available = comm.size > 1
sys.modules["cupy"] = cupy

# Many turns of small pieces, and many chunks.
cuda_aware.DEVICE_PIECE_BYTES = base.PIECE_BYTES = base.SMALLEST_PIECE_BYTES
through_host.CHUNK_BYTES = 10_000


class Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


messages = Messages()
logger = logging.getLogger("smorms3_dist.collectives.connect")
logger.addHandler(messages)
logger.setLevel(logging.INFO)


class Allocations(CudaMemory):
    count = 0

    def empty(self, size: int, dtype: np.dtype, what: str) -> Any:
        self.count += 1
        return super().empty(size, dtype, what)


def check_interface() -> None:
    """mpi4py takes what has nothing but the interface of arrays on GPUs."""

    class OnDevice:
        def __init__(self, array: np.ndarray) -> None:
            self.__cuda_array_interface__ = array.view(
                fake_cupy.DeviceArray
            ).__cuda_array_interface__

    sent, received = np.arange(7, dtype=np.uint8), np.zeros(7, np.uint8)
    MPI.COMM_SELF.Sendrecv(
        [OnDevice(sent), MPI.BYTE], 0, recvbuf=[OnDevice(received), MPI.BYTE], source=0
    )
    np.testing.assert_array_equal(received, sent)


def run(aware: bool) -> dict[str, Any]:
    cuda_aware.is_cuda_aware = lambda: aware
    messages.said.clear()
    host = connect(comm)
    memory = Allocations(0, cupy, None)  # type: ignore[arg-type]
    collectives = on_memory(host, memory, comm, None)
    assert on_memory(host, memory, comm, None) is collectives
    collectives.prepare(device_checks.make_group(comm.size, "float32", 1 << 30))
    prepared = memory.count
    collectives.prepare(device_checks.make_group(comm.size, "float32", 1))
    assert memory.count == prepared > 0
    for check in device_checks.CHECKS:
        check(collectives, host, memory)
    try:
        on_memory(host, memory, comm, "float16")
    except ValueError as error:
        refusal = str(error)
    kind = type(collectives).__name__
    return {"kind": kind, "said": list(messages.said), "refusal": refusal}


check_interface()
report(comm.rank, all=run(True), first=run(comm.rank < comm.size - 1))

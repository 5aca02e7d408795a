"""Collectives on the memory of GPUs over an MPI library that knows CUDA.

Such a library takes device pointers. One that does not would crash, or send whatever lies at that
address of the host: so the library is asked itself, and no pointer is ever tried.

The exchange is that of the host, with buffers on the device. MPI knows nothing of streams: what it
reads has to be there, and what it overwrites to be used up, before it is called. Sums are formed on
the device in the order of the ranks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from smorms3_dist.collectives.base import Consume, DeviceCollectives, Gradients
from smorms3_dist.collectives.mpi import Exchange, MpiCollectives
from smorms3_dist.device.memory import CudaMemory
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.layout import Bucket, GroupLayout, Piece

import numpy as np

if TYPE_CHECKING:
    from mpi4py import MPI

DEVICE_PIECE_BYTES = 1 << 23
"""What a rank has in flight of one piece, summed over its peers: more than on the host, as for each
piece the host waits for the GPU once."""

_MPIX_GPU_SUPPORT_CUDA = 0


def is_cuda_aware(library: ctypes.CDLL | None = None) -> bool:
    """Asks the MPI library whether it takes pointers to the memory of GPUs.

    Open MPI and its kin answer ``MPIX_Query_cuda_support``, MPICH and its kin
    ``MPIX_GPU_query_support``. A library that has neither does not. MPI must have been initialized.
    The library is that which mpi4py has loaded, if left out.
    """
    if library is None:
        from mpi4py import MPI

        # What is looked up in a module is looked up in the libraries that it is linked to as well.
        library = ctypes.CDLL(MPI.__file__)
    if hasattr(library, "MPIX_Query_cuda_support"):
        return bool(library.MPIX_Query_cuda_support())
    if hasattr(library, "MPIX_GPU_query_support"):
        supported = ctypes.c_int(0)
        status = library.MPIX_GPU_query_support(_MPIX_GPU_SUPPORT_CUDA, ctypes.byref(supported))
        return status == 0 and bool(supported.value)
    return False


class CudaAwareCollectives(DeviceCollectives):
    """Collectives that hand device pointers to MPI; those on the host are over the same library."""

    def __init__(self, host: MpiCollectives, memory: CudaMemory) -> None:
        super().__init__(host)
        self.bytes_sent = host.bytes_sent
        self._memory = memory
        self._comm = host.comm
        self._exchanges: dict[np.dtype, _DeviceExchange] = {}

    def piece_limit(self, dtype: np.dtype) -> int:
        """See `Collectives.piece_limit`."""
        return DEVICE_PIECE_BYTES // max(self.size - 1, 1) // dtype.itemsize

    def prepare(self, group: GroupLayout) -> None:
        """See `Collectives.prepare`."""
        self._exchange(group)

    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        """See `Collectives.reduce_scatter`; each piece is in flight while the last is consumed."""
        self._exchange(group).run(self.pieces(group), gradients, consume)
        self._count_reduce_scatter(group)

    def _exchange(self, group: GroupLayout) -> _DeviceExchange:
        exchange = self._exchanges.get(group.dtype)
        if exchange is None:
            limit = self.piece_limit(group.dtype)
            exchange = _DeviceExchange(self._comm, group.dtype, limit, self._memory)
            self._exchanges[group.dtype] = exchange
        return exchange

    def all_gather(self, flat: Any, buckets: Sequence[Bucket]) -> None:
        """See `Collectives.all_gather`."""
        self._memory.current_stream().synchronize()
        self._host.all_gather(flat, buckets)

    def broadcast(self, array: Any, root: int = 0) -> None:
        """See `Collectives.broadcast`; also of arrays in host memory."""
        self._memory.current_stream().synchronize()
        self._host.broadcast(array, root)


class _DeviceExchange(Exchange):
    """The exchange of pieces with its buffers, and its sums, on the device."""

    def __init__(
        self, comm: MPI.Intracomm, dtype: np.dtype, limit: int, memory: CudaMemory
    ) -> None:
        def empty(size: int, dtype: np.dtype) -> Any:
            return memory.empty(size, dtype, "gradients on their way between ranks")

        super().__init__(comm, dtype, limit, empty)
        self._memory = memory
        self._total = empty(limit, dtype)

    def _start(
        self, turn: int, pieces: Sequence[Sequence[Piece]], gradients: Gradients
    ) -> tuple[list[MPI.Request], list[MPI.Request]]:
        outgoing = list(self._outgoing(turn, pieces, gradients))
        # What was received into these buffers before is used up then, and what is sent is there.
        self._memory.current_stream().synchronize()
        receives = self._receive(turn, pieces)
        return receives, [self._send(peer, data) for peer, data in outgoing]

    def _mean(self, turn: int, piece: Piece, gradients: Gradients) -> Mean:
        mean = super()._mean(turn, piece, gradients)
        if mean.second is None:
            return mean
        # Kernels on a GPU take the sum, and scale it themselves.
        total = self._total[: piece.size]
        with np.errstate(all="ignore"):
            np.add(mean.first, mean.second, out=total)
        return Mean(total, None, mean.scale)

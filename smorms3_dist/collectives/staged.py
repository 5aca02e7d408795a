"""Collectives on the memory of GPUs through host memory, for MPI libraries that know no CUDA.

Such a library must never see a device pointer. Each piece is copied to the host, exchanged there
and summed there; the mean goes back to the GPU. Sums are in the order of the ranks, as always on
the host, so results are those of the host's collectives bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from smorms3_dist.collectives.base import (
    Collectives,
    Consume,
    DeviceCollectives,
    Gradients,
    Mean,
)
from smorms3_dist.layout import Bucket, GroupLayout, Piece

import numpy as np

if TYPE_CHECKING:
    from smorms3_dist.memory import Memory

_CHUNK_BYTES = 1 << 28


class StagedCollectives(DeviceCollectives):
    """Collectives on device memory through collectives on host memory.

    Args:
        host: Collectives of the same ranks on host memory.
        memory: The device memory.
    """

    def __init__(self, host: Collectives, memory: Memory) -> None:
        super().__init__(host)
        self.bytes_sent = host.bytes_sent
        self._memory = memory

    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        """See `Collectives.reduce_scatter`."""
        size = self._host.piece_limit(group.dtype)
        incoming = self._memory.zeros(size, group.dtype)
        mean_on_host = np.empty(size, group.dtype)

        def consume_on_device(piece: Piece, mean: Mean) -> None:
            on_host, on_device = mean_on_host[: piece.size], incoming[: piece.size]
            mean.evaluate(on_host)
            on_device.set(on_host)
            consume(piece, Mean(on_device))

        self._host.reduce_scatter(group, _OnHost(gradients, self._memory), consume_on_device)

    def all_gather(self, flat: Any, buckets: Sequence[Bucket]) -> None:
        """See `Collectives.all_gather`."""
        for bucket in buckets:
            on_host = np.empty(bucket.stop - bucket.start, flat.dtype)
            start, stop = bucket.part_of(self.rank)
            part = on_host[start - bucket.start : stop - bucket.start]
            flat[start:stop].get(out=part)
            whole = Bucket(0, on_host.size, bucket.part)
            self._host.all_gather(on_host, [whole])
            flat[bucket.start : bucket.stop].set(on_host)

    def broadcast(self, array: Any, root: int = 0) -> None:
        """See `Collectives.broadcast`; also of arrays in host memory."""
        if isinstance(array, np.ndarray) and not hasattr(array, "get"):
            self._host.broadcast(array, root)
            return
        flat = array.reshape(-1)
        step = max(_CHUNK_BYTES // array.itemsize, 1)
        for start in range(0, flat.size, step):
            chunk = flat[start : start + step]
            on_host = np.empty(chunk.size, array.dtype)
            if self.rank == root:
                chunk.get(out=on_host)
            self._host.broadcast(on_host, root)
            if self.rank != root:
                chunk.set(on_host)


class _OnHost:
    """A rank's gradients, copied to the host as they are asked for."""

    def __init__(self, gradients: Gradients, memory: Memory) -> None:
        self._gradients = gradients
        self._memory = memory

    def read_piece(self, owner: int, piece: Piece, scratch: np.ndarray) -> np.ndarray:
        """See `Gradients.read_piece`."""
        packed = self._memory.zeros(piece.size, scratch.dtype)
        on_device: Any = self._gradients.read_piece(owner, piece, packed)
        on_device.get(out=scratch)
        return scratch

    def pack_bucket(self, bucket: Bucket, out: np.ndarray, scale: float) -> None:
        """See `Gradients.pack_bucket`; the host's collectives read pieces."""
        raise NotImplementedError("collectives on host memory read pieces")

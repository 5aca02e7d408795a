"""Collectives over any object with ChainerMN's communicator interface, on host memory.

ChainerMN's own communicators carry an MPI communicator, and `MpiCollectives` uses that. This module
serves the others (wrappers, simulators, communicators of other transports) through the methods of
`chainermn.CommunicatorBase` alone: `alltoall`, `bcast` and the object collectives. It is correct
rather than fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smorms3_dist.collectives.base import Collectives, Consume, Gradients, Reducer
from smorms3_dist.kernels.narrow import BFLOAT16
from smorms3_dist.layout import Bucket, GroupLayout

import numpy as np

REQUIRED_METHODS = ("alltoall", "bcast", "gather_obj", "bcast_obj")
"""What a communicator must have, besides ``rank`` and ``size``."""

_WIRE = {np.dtype(np.float16): np.dtype(np.float32), BFLOAT16: np.dtype(np.int32)}
"""What holds values exactly that have no dtype of their own there."""


class CommunicatorCollectives(Collectives):
    """Collectives through ChainerMN's communicator interface.

    Its ``alltoall`` must take arrays of different lengths, as ChainerMN's does.
    """

    def __init__(self, communicator: Any) -> None:
        super().__init__(communicator.rank, communicator.size)
        self._communicator = communicator

    def _exchange(self, outgoing: Sequence[np.ndarray]) -> list[np.ndarray]:
        # ChainerMN's communicators do not carry float16 between arrays reliably, nor uint16 at all.
        dtype = outgoing[0].dtype
        wire = _WIRE.get(dtype, dtype)
        incoming = self._communicator.alltoall(tuple(part.astype(wire) for part in outgoing))
        return [part.astype(dtype, copy=False) for part in incoming]

    def reduce_scatter(self, group: GroupLayout, gradients: Gradients, consume: Consume) -> None:
        """See `Collectives.reduce_scatter`."""
        pieces = self.pieces(group)
        limit = self.piece_limit(group.dtype)
        reduce = Reducer(group.dtype, self.size, limit, sent=gradients.dtype)
        scratch = np.empty((self.size, limit), gradients.dtype)
        nothing = np.empty(0, gradients.dtype)
        for turn in range(max(map(len, pieces), default=0)):
            outgoing = [
                gradients.read_piece(owner, theirs[turn], scratch[owner, : theirs[turn].size])
                if turn < len(theirs)
                else nothing
                for owner, theirs in enumerate(pieces)
            ]
            incoming = self._exchange(outgoing)
            if turn < len(pieces[self.rank]):
                consume(pieces[self.rank][turn], reduce(incoming))
        self._count_reduce_scatter(group, gradients.dtype.itemsize)

    def all_gather(self, flat: np.ndarray, buckets: Sequence[Bucket]) -> None:
        """See `Collectives.all_gather`."""
        for bucket in buckets:
            outgoing = [flat[bucket.part_of(self.rank)]] * self.size
            incoming = self._exchange(outgoing)
            flat[bucket.start_f : bucket.stop_f] = np.concatenate(incoming)
            self.bytes_sent["all_gather"] += bucket.part_size * flat.itemsize * (self.size - 1)

    def broadcast(self, array: np.ndarray, root: int = 0) -> None:
        """See `Collectives.broadcast`."""
        wire = np.float32 if array.dtype == np.float16 else array.dtype
        array[...] = self._communicator.bcast(array.astype(wire), root=root)
        if self.rank == root:
            self.bytes_sent["broadcast"] += array.nbytes * (self.size - 1)

    def all_gather_object(self, value: Any) -> list[Any]:
        """See `Collectives.all_gather_object`."""
        gathered = self._communicator.gather_obj(value, root=0)
        return list(self._communicator.bcast_obj(gathered, root=0))

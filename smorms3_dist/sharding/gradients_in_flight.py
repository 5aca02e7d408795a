"""Double buffering: gradients on their way from the update that has them to the next one.

An update takes the gradients of its parameters, so that the next forward and backward pass can
write new ones, and lets them be reduced beside the training. What comes of it, the mean gradient of
this rank's shard, lies among the states of its group, as `IN_FLIGHT`, until the next update applies
it: so it is saved, loaded and moved as they are.
"""

from __future__ import annotations

from typing import Any

from smorms3_dist.collectives.base import Collectives, ReduceScatter, SideChannel
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.tables import PackedPart, PackTable
from smorms3_dist.layout import Bucket, Piece
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.sharded_model import ShardedModel
from smorms3_dist.sharding.states import IN_FLIGHT

import numpy as np


class GradientsInFlight:
    """The gradients of one optimizer between two updates.

    Attributes:
        are_there: Whether the next update has any to apply.
        loss_scale: What they have been multiplied by, or ``None``.
    """

    def __init__(self) -> None:
        self.are_there = False
        self.loss_scale: float | None = None
        self._sharded: ShardedModel | None = None
        self._taken: list[_Taken] = []
        self._channel: SideChannel | None = None
        self._opened_by: Collectives | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.finish()
        own: dict[str, Any] = {"_sharded": None, "_taken": [], "_channel": None, "_opened_by": None}
        return {**vars(self), **own}

    @property
    def in_words(self) -> str:
        """What ranks must have alike of them."""
        return f"loss scale {self.loss_scale}" if self.are_there else "none"

    def finish(self) -> None:
        """Waits until the gradients that are under way have been reduced.

        Raises:
            RuntimeError: If that has failed, naming the rank, and why.
        """
        if self._channel is not None:
            self._channel.finish()

    def drop(self) -> None:
        """Lets go of them; the next update has none to apply."""
        self.finish()
        self.are_there, self.loss_scale = False, None
        self._sharded, self._taken = None, []

    def take(self, sharded: ShardedModel) -> None:
        """Takes this rank's gradients from the parameters, which have none then.

        What was taken before must have been reduced.
        """
        if sharded is not self._sharded:
            self._sharded = sharded
            self._taken = [_Taken(group) for group in sharded.sharded_groups]
        for taken in self._taken:
            taken.take()

    def send(self, collectives: Collectives, loss_scale: float | None) -> None:
        """Begins to reduce what was taken, in the place of what was applied. Collective."""
        if self._channel is None or self._opened_by is not collectives:
            self._channel, self._opened_by = collectives.open_side_channel(), collectives
        sharded, everything = self._sharded, self._taken
        assert sharded is not None

        def reduce(ranks: ReduceScatter) -> None:
            for taken in everything:
                gradients = sharded.as_sent(taken.group, taken)
                ranks.reduce_scatter(taken.group.layout, gradients, taken.store)

        self.are_there, self.loss_scale = True, loss_scale
        self._channel.start(reduce)


class _Taken:
    """A rank's gradients of a group, copied: a `smorms3_dist.collectives.base.Gradients`."""

    def __init__(self, group: ShardedGroup) -> None:
        self.group = group
        size, dtype = group.layout.size, group.dtype
        self._flat = group.memory.zeros(size, dtype, f"gradients in flight in {dtype}")
        self._tables: dict[int, PackTable] = {}

    @property
    def dtype(self) -> np.dtype:
        """See `Gradients.dtype`."""
        return self.group.dtype

    def take(self) -> None:
        """Copies the gradients that the parameters have, and clears them there."""
        buffers = self.group.buffers
        with buffers.gradients():
            if self.group.memory.launcher is not None:
                for bucket in self.group.layout.buckets:
                    buffers.pack_bucket(bucket, self._flat[bucket.start_f : bucket.stop_f], 1.0)
            else:
                buffers.copy_gradients(self._flat)
        buffers.clear_gradients()

    def store(self, piece: Piece, mean: Mean) -> None:
        """Keeps the mean of a piece: a `smorms3_dist.collectives.base.Consume`."""
        mean.evaluate(self.group.states[IN_FLIGHT][piece.range_s])

    def read_piece(self, owner: int, piece: Piece, scratch: np.ndarray) -> np.ndarray:
        """See `Gradients.read_piece`."""
        if len(piece.segments) == 1:
            return self._flat[piece.segments[0].range_f]
        if not self.group.layout.dense:
            scratch[...] = 0  # the gaps
        for segment in piece.segments:
            start = segment.start_s - piece.start_s
            scratch[start : start + segment.size] = self._flat[segment.range_f]
        return scratch

    def pack_bucket(self, bucket: Bucket, out: Any, scale: float) -> None:
        """See `Gradients.pack_bucket`."""
        table = self._tables.get(bucket.size)
        if table is None:
            whole = [PackedPart(0, bucket.size, 0)]
            launcher = self.group.memory.launcher
            assert launcher is not None
            table = self._tables[bucket.size] = PackTable(launcher, whole)
        table.pack([self._flat[bucket.start_f : bucket.stop_f]], out, scale)

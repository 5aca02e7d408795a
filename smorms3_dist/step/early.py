"""A reduce-scatter that begins during the backward pass.

A thread makes it, through a channel of its own. It takes the pieces of all shards in one order,
which the ranks have agreed on, and waits for each until the gradients in it have been handed over.
What comes of it is the mean gradient of this rank's shard, kept until the update; and the mean is
formed in the order of the ranks, as always.

No rank waits for another one before the agreement that precedes every step: until then a rank may
fail, end, or turn out to have no use for what it has received.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from smorms3_dist.collectives.base import Collectives, EarlyChannel, EarlyReduceScatter, Order
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.layout import Bucket, Piece
from smorms3_dist.sharding.buffers import SlotGradients
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.owned_states import Group
from smorms3_dist.sharding.rules import Kind
from smorms3_dist.sharding.sharded_model import ShardedModel
from smorms3_dist.sharding.staged_gradient import StagedGradient

import chainer
import numpy as np

_WAIT = "in the reduction of gradients that began with the backward pass"


MeanOfBatches = Callable[[chainer.Parameter, Any], Any]
"""``mean(param, grad)``: the mean of a gradient, or ``None``, and those of micro-batches before."""


class Schedule:
    """In which order the pieces of a model's shards are reduced: the same on all ranks.

    Args:
        sharded: The model.
        order: Names of parameters, in the order in which their gradients become final. Those that
            it does not name come last.
        collectives: The ranks.

    Attributes:
        sharded: The model.
        order: The names.
        pieces: The groups, with the pieces of each rank's shard, by rank. The largest group comes
            first.
        wait: Where this rank notes that it waits.
    """

    def __init__(
        self, sharded: ShardedModel, order: Sequence[str], collectives: Collectives
    ) -> None:
        self.sharded = sharded
        self.order = tuple(order)
        self.wait = collectives.wait
        turn = {name: index for index, name in enumerate(order)}

        def when(piece: Piece) -> int:
            return max(turn.get(segment.slot.name, len(turn)) for segment in piece.segments)

        groups = [g for g in sharded.sharded_groups if g.plan.kind is not Kind.NONE]
        groups.sort(key=lambda group: -group.layout.size)
        self.pieces = [
            (group, [sorted(of_rank, key=when) for of_rank in collectives.pieces(group.layout)])
            for group in groups
        ]


class EarlyReduction:
    """The reduce-scatter of one step. Its thread starts with it.

    Args:
        schedule: The order.
        channel: Reaches the other ranks.
        mean: What of a gradient that is handed over is reduced.
    """

    def __init__(
        self,
        schedule: Schedule,
        channel: EarlyChannel,
        mean: MeanOfBatches = lambda param, grad: grad,
    ) -> None:
        self._sharded = schedule.sharded
        self._channel = channel
        self._mean = mean
        self._wait = schedule.wait
        self._changed = threading.Condition()
        self._has_ended = False
        self._handed_over: dict[int, Any] = {}
        staged = {id(gradient.group): gradient for gradient in schedule.sharded.stage().values()}
        self._parts = [
            _Part(group, staged[id(group)], pieces, channel, self._changed)
            for group, pieces in schedule.pieces
        ]
        self._places = {
            id(param): (part, slot.index)
            for part in self._parts
            for slot, param in part.group.parameters()
        }
        channel.start_early(self._run)

    def _run(self, ranks: EarlyReduceScatter) -> None:
        try:
            for part in self._parts:
                part.reduce(self._sharded, ranks)
        finally:
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    @property
    def params(self) -> Iterator[chainer.Parameter]:
        """The parameters whose gradients are reduced here."""
        return (param for part in self._parts for _, param in part.group.parameters())

    def includes(self, group: Group) -> bool:
        """Whether the gradients of a group are reduced here."""
        return any(part.group is group for part in self._parts)

    def hand_over(self, param: chainer.Parameter, grad: Any) -> None:
        """Takes a gradient that is final: a `smorms3_dist.step.last_use.Final`."""
        part, index = self._places[id(param)]
        self._handed_over[id(param)] = grad
        part.take(index, self._mean(param, grad))

    def hand_over_rest(self) -> bool:
        """Takes the gradients that have not come yet as they are, when the backward pass is over.

        Returns:
            Whether those that have come are still the parameters' gradients.
        """
        right = True
        for param in self.params:
            if id(param) not in self._handed_over:
                self.hand_over(param, param.grad)
            else:
                right = right and param.grad is self._handed_over[id(param)]
        return right

    def arrivals(self, group: ShardedGroup) -> Iterator[tuple[Piece, Mean]]:
        """The pieces of a group's own shard with their means, as they come.

        When the last one has come, nothing of the gradients is under way any more.
        """
        part = next(part for part in self._parts if part.group is group)
        for count, piece in enumerate(part.own, 1):
            self._wait_for(part, count)
            yield piece, Mean(part.staged.grad[piece.range_s])
        self._wait_for(part)

    def finish(self, group: ShardedGroup) -> None:
        """Waits until the staged gradient of a group is complete."""
        for _ in self.arrivals(group):
            pass

    def _wait_for(self, part: _Part, count: int | None = None) -> None:
        """Waits until so many own pieces of a part have come, or all that belongs to it."""
        self._channel.hurry()
        with self._wait.inside(_WAIT), self._changed:
            while (part.is_under_way if count is None else part.arrived < count) and (
                not self._has_ended
            ):
                self._changed.wait()
        if self._has_ended:
            self._channel.finish()

    def end(self) -> None:
        """Comes to the end of it with all other ranks, used or not. Collective."""
        for part in self._parts:
            part.take_nothing()
        self._channel.finish()

    def abandon(self) -> None:
        """Gives it up, and the channel with it."""
        self._channel.abandon()
        with self._changed:
            self._changed.notify_all()


class _Part:
    """The gradients of one group on their way: a `smorms3_dist.collectives.base.Gradients`."""

    def __init__(
        self,
        group: ShardedGroup,
        staged: StagedGradient,
        order: Order,
        channel: EarlyChannel,
        changed: threading.Condition,
    ) -> None:
        self.group = group
        self.staged = staged
        self.own = order[group.shard.rank]
        self.arrived = 0
        self.is_under_way = True
        self._order = order
        self._channel = channel
        self._changed = changed
        self._is_there = [False] * len(group.layout.slots)
        self._gradients = self._no_gradients()

    @property
    def dtype(self) -> np.dtype:
        """See `Gradients.dtype`."""
        return self.group.dtype

    def _no_gradients(self) -> SlotGradients:
        layout = self.group.layout
        return SlotGradients(layout, [None] * len(layout.slots), layout.dense)

    def take(self, index: int, grad: Any | None) -> None:
        """Takes the gradient of the slot of that index."""
        with self._changed:
            self._gradients.take(index, grad)
            self._is_there[index] = True
            self._changed.notify_all()

    def take_nothing(self) -> None:
        """Takes zeros for all gradients that have not come."""
        for index, is_there in enumerate(self._is_there):
            if not is_there:
                self.take(index, None)

    def reduce(self, sharded: ShardedModel, ranks: EarlyReduceScatter) -> None:
        """Makes the reduce-scatter, in the thread."""
        gradients = sharded.as_sent(self.group, self)
        ranks.reduce_in_order(self.group.layout, gradients, self._store, self._order)
        with self._changed:
            self._gradients = self._no_gradients()
            self.is_under_way = False
            self._changed.notify_all()

    def _store(self, piece: Piece, mean: Mean) -> None:
        self.staged.store_piece(piece, mean)
        with self._changed:
            self.arrived += 1
            self._changed.notify_all()

    def read_piece(self, owner: int, piece: Piece, scratch: np.ndarray) -> np.ndarray:
        """See `Gradients.read_piece`; waits until the gradients are there."""
        indices = {segment.slot.index for segment in piece.segments}
        while True:
            with self._changed:
                if all(self._is_there[index] for index in indices):
                    break
                self._changed.wait(self._channel.pause_s)
            self._channel.progress()
        return self._gradients.read_piece(piece, scratch)

    def pack_bucket(self, bucket: Bucket, out: np.ndarray, scale: float) -> None:
        """See `Gradients.pack_bucket`; collectives on host memory read pieces."""
        raise NotImplementedError("collectives on host memory read pieces")

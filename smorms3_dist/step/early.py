"""A reduce-scatter that begins during the backward pass.

It goes through a channel of its own, in host memory by a thread, on GPUs by a stream. It takes the
pieces of all shards in one order, which the ranks have agreed on, and each of them as soon as the
gradients in it have been handed over. What comes of it is the mean gradient of this rank's shard,
kept until the update; it is the mean that a reduction after the backward pass gives.

No rank waits for another one before the agreement that precedes every step: until then a rank may
fail, end, or turn out to have no use for what it has received.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from smorms3_dist.collectives.base import EarlyChannel, EarlyReduceScatter, Order
from smorms3_dist.device.memory import Memory
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.layout import Bucket, Piece
from smorms3_dist.sharding.buffers import SlotGradients
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.owned_states import Group
from smorms3_dist.sharding.rules import Kind
from smorms3_dist.sharding.sharded_model import ShardedModel
from smorms3_dist.sharding.staged_gradient import StagedGradient
from smorms3_dist.waiting import Wait

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
        channel: Reduces them.
        wait: Where this rank notes that it waits.

    Attributes:
        sharded: The model.
        order: The names.
        pieces: The groups, with the pieces of each rank's shard, by rank. The largest group comes
            first.
        wait: As given.
    """

    def __init__(
        self, sharded: ShardedModel, order: Sequence[str], channel: EarlyChannel, wait: Wait
    ) -> None:
        self.sharded = sharded
        self.order = tuple(order)
        self.wait = wait
        turn = {name: index for index, name in enumerate(order)}
        groups = [g for g in sharded.sharded_groups if g.plan.kind is not Kind.NONE]
        groups.sort(key=lambda group: -group.layout.size)
        self.pieces = []
        for group in groups:
            turns = [turn.get(slot.name, len(turn)) for slot in group.layout.slots]
            self.pieces.append((group, channel.prepare(group.layout, turns)))


class EarlyReduction:
    """The reduce-scatter of one step.

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

    def _run(self, ranks: EarlyReduceScatter) -> Iterator[None]:
        try:
            for part in self._parts:
                for bucket in part.reduce(self._sharded, ranks):
                    while not part.has(bucket):
                        yield
                part.end()
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
        self._go_on()

    def hand_over_nothing(self) -> None:
        """Takes zeros for all gradients that have not come: it is not going to be used."""
        for part in self._parts:
            part.take_nothing()
        self._go_on()

    def _go_on(self) -> None:
        if not self._channel.has_thread:
            self._channel.progress()

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
            yield piece, part.arrived[count - 1].awaited()
        self._wait_for(part)

    def finish(self, group: ShardedGroup) -> None:
        """Waits until the staged gradient of a group is complete."""
        for _, mean in self.arrivals(group):
            mean.evaluate(mean.first)

    def _wait_for(self, part: _Part, count: int | None = None) -> None:
        """Waits until so many own pieces of a part have come, or all that belongs to it."""
        with self._wait.inside(_WAIT):
            self._channel.hurry()
            with self._changed:
                while (part.is_under_way if count is None else len(part.arrived) < count) and (
                    not self._has_ended
                ):
                    self._changed.wait()
        if self._has_ended:
            self._channel.finish()

    def end(self) -> None:
        """Comes to the end of it with all other ranks, used or not. Collective."""
        self.hand_over_nothing()
        self._channel.finish()
        for part in self._parts:
            for piece in part.arrived[-1:]:
                piece.awaited()

    def abandon(self) -> None:
        """Gives it up, and the channel with it."""
        self._channel.abandon()
        # What is under way may yet read gradients, and write to what it was to come to.
        _abandoned.append(self)
        with self._changed:
            self._changed.notify_all()


_abandoned: list[EarlyReduction] = []


class _Arrived(NamedTuple):
    """The mean of a piece.

    Attributes:
        mean: It, in the staged gradient; on a GPU a sum still to be scaled, by the update.
        memory: Where it is.
        mark: Of the stream that has written it.
    """

    mean: Mean
    memory: Memory
    mark: Any

    def awaited(self) -> Mean:
        """It, for what is computed from now on."""
        self.memory.follow(self.mark)
        return self.mean


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
        self.arrived: list[_Arrived] = []
        self.is_under_way = True
        self._order = order
        self._channel = channel
        self._changed = changed
        self._is_there = [False] * len(group.layout.slots)
        layout = group.layout
        # Until nothing reads them any more: the end of all of it.
        self._gradients = SlotGradients(layout, [None] * len(layout.slots), layout.dense)

    @property
    def dtype(self) -> np.dtype:
        """See `Gradients.dtype`."""
        return self.group.dtype

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

    def has(self, bucket: Bucket) -> bool:
        """Whether all gradients of a bucket are there."""
        slots = self.group.layout.slots_of_buckets[bucket]
        return all(self._is_there[slot.index] for slot in slots)

    def reduce(self, sharded: ShardedModel, ranks: EarlyReduceScatter) -> Iterable[Bucket]:
        """Makes the reduce-scatter: see `EarlyReduceScatter.reduce_in_order`."""
        gradients = sharded.as_sent(self.group, self)
        return ranks.reduce_in_order(self.group.layout, gradients, self._store, self._order)

    def end(self) -> None:
        """Notes that the reduce-scatter has been made."""
        with self._changed:
            self.is_under_way = False
            self._changed.notify_all()

    def _store(self, piece: Piece, mean: Mean) -> None:
        kept, memory = mean.kept_in(self.staged.grad[piece.range_s]), self.group.memory
        with self._changed:
            self.arrived.append(_Arrived(kept, memory, memory.mark()))
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
        """See `Gradients.pack_bucket`; the gradients are there."""
        self.group.buffers.pack_bucket(bucket, out, scale, self._gradients)

"""A model laid out over the ranks: the buffers and updates of all its groups.

What a step does with all groups alike is here; in which order, and when hooks run in between, is
the optimizer's business.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator
from typing import Any

from smorms3_dist.collectives.base import Collectives, Consume, DeviceCollectives
from smorms3_dist.device.memory import Memory
from smorms3_dist.hooks import running as hooks
from smorms3_dist.hooks.views import WholeParameter
from smorms3_dist.sharding.buffers import FlatBuffers
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.model import ModelView, agree_on_layout
from smorms3_dist.sharding.rules import Kind
from smorms3_dist.sharding.staged_gradient import StagedGradient, names_not_finite
from smorms3_dist.sharding.whole_group import WholeGroup, move_states

import chainer
import numpy as np

Update = ShardedGroup | WholeGroup


class ShardedModel:
    """The groups of a model, laid out. Made by all ranks together.

    Args:
        model: The model on this rank. Its parameters become views of flat buffers; those that are
            initialized on other ranks are initialized here, too.
        memory: Where it is.
        collectives: The ranks.
        broadcast: Whether every rank takes the parameters of rank 0.
        before: The shards that these take the place of, whose states go over.

    Attributes:
        model: The model, as at the last update.
        layout: Its layout.
        rank: The rank whose shards these are.
        updates: The updates of its groups.
        staged: The gradients of the shards, by index of the group, while there is memory for them;
            empty otherwise.
        kept: Whether these are what hooks have left of the gradients of the last step.

    Raises:
        RuntimeError: If the ranks' models differ, naming the first parameter and the ranks.
        MemoryError: If a rank has not enough memory; on all ranks, naming it. Parameters and the
            states of their rules are then as they were.
    """

    def __init__(
        self,
        model: ModelView,
        memory: Memory,
        collectives: Collectives,
        broadcast: bool,
        before: ShardedModel | None = None,
    ) -> None:
        self.layout = agree_on_layout(model, collectives, memory)
        self.rank = collectives.rank
        self.model = model
        self.updates: list[Update] = []
        self.staged: dict[int, StagedGradient] = {}
        self.kept = False
        self._allocate(memory, collectives)
        for update in self.updates:
            if broadcast:
                collectives.broadcast(update.buffers.flat)
            if isinstance(update, ShardedGroup):
                update.take_states()
        if before is not None:
            move_states(before.updates, self.updates, collectives)

    def _allocate(self, memory: Memory, collectives: Collectives) -> None:
        """Makes the updates; on all ranks, or on none."""
        lack: str | None = None
        try:
            for group in self.layout.groups:
                params = [self.model.initialized[slot.name] for slot in group.slots]
                buffers = FlatBuffers(group, params, memory)
                plan = self.model.plans[group.slots[0].name]
                self.updates.append(
                    WholeGroup(buffers, plan)
                    if plan.kind is Kind.WHOLE
                    else ShardedGroup(buffers, group.shards[collectives.rank], plan)
                )
                collectives.prepare(group)
        except MemoryError as error:
            # Its words alone: the error would keep what was allocated before it.
            lack = str(error)
        for rank, message in enumerate(collectives.all_gather_object(lack)):
            if message is not None:
                raise MemoryError(f"rank {rank}: {message}")

    def __getstate__(self) -> dict[str, object]:
        # Staged gradients are views into buffers, and of a step that is over.
        return {**self.__dict__, "staged": {}, "kept": False}

    @property
    def sharded(self) -> Iterator[ShardedGroup]:
        """The updates of the groups whose states are sharded."""
        return (update for update in self.updates if isinstance(update, ShardedGroup))

    @property
    def whole(self) -> Iterator[WholeGroup]:
        """The updates of the groups whose states every rank has."""
        return (update for update in self.updates if isinstance(update, WholeGroup))

    def adopt(self) -> None:
        """Takes over the arrays that somebody has given to parameters."""
        for update in self.updates:
            update.buffers.adopt()

    def stage(self) -> dict[int, StagedGradient]:
        """Makes the gradients of the shards, where they are not there yet."""
        if not self.staged:
            self.staged = {
                index: StagedGradient(update)
                for index, update in enumerate(self.updates)
                if isinstance(update, ShardedGroup)
            }
        return self.staged

    def reduce(self, update: Update, consume: Consume, collectives: Collectives) -> None:
        """Averages the gradients of a group; each rank consumes its own shard. Collective."""
        with update.buffers.gradients():
            collectives.reduce_scatter(update.buffers.group, update.buffers, consume)

    def reduce_whole(self, update: Update, collectives: Collectives) -> None:
        """Gives every rank the whole mean gradients of a group. Collective."""
        self.reduce(update, update.buffers.store_piece, collectives)
        _gather_whole_gradients(update.buffers, collectives)

    def gather_gradients(self, collectives: Collectives) -> None:
        """Gives every rank the whole mean gradients from those of the shards. Collective."""
        for gradient in self.staged.values():
            gradient.show_in_parameters()
            _gather_whole_gradients(gradient.update.buffers, collectives)

    def gather(self, update: Update, collectives: Collectives) -> None:
        """Gives every rank the parameters of a group as their owners have them. Collective."""
        update.buffers.adopt()
        collectives.all_gather(update.buffers.flat, update.buffers.group.buckets)

    def found(self, collectives: Collectives) -> Any:
        """Finds the norm of the staged gradients, and what is not finite, on a GPU. Collective.

        Returns:
            The sum of squares and the number of elements that are not finite, over all ranks and
            groups: float64 there.
        """
        assert isinstance(collectives, DeviceCollectives)
        total = functools.reduce(operator.add, (g.found() for g in self.staged.values()))
        collectives.all_reduce_sum(total)
        return total

    def not_finite(self) -> Iterator[str]:
        """Names of the parameters of whose gradients what lies here is infinite or nan."""
        for index, update in enumerate(self.updates):
            buffers = update.buffers
            if index in self.staged:
                yield from self.staged[index].not_finite()
            elif isinstance(update, ShardedGroup):
                grads = (buffers.flat_grad[s.flat] for s in update.shard.segments)
                yield from names_not_finite(update.shard, grads)
            else:
                for slot, param in zip(buffers.group.slots, buffers.params, strict=True):
                    if not np.isfinite(param.grad).all():
                        yield slot.name

    def parts(self, loss_scale: float | None) -> list[hooks.Part]:
        """What this rank holds of each parameter, in the order in which Chainer calls hooks.

        Args:
            loss_scale: What the gradients have been multiplied by.
        """
        parts = {}
        for gradient in self.staged.values():
            for part in gradient.parts(loss_scale):
                parts[part.name] = part
                if not part.owners:
                    # Nobody owns a parameter without elements, but its dtype counts in norms.
                    param = self.model.initialized[part.name]
                    param.grad = np.zeros_like(param.array)
                    parts[part.name] = _whole(part.name, param)
        for update in self.whole:
            for slot, param in zip(update.buffers.group.slots, update.buffers.params, strict=True):
                param._loss_scale = loss_scale
                parts[slot.name] = _whole(slot.name, param)
        for name, param in self.model.uninitialized.items():
            parts[name] = _whole(name, param)
        return [parts[name] for name in self.model.names_in_order]

    def in_order_of_hooks(self, parts: Iterable[hooks.Part]) -> list[hooks.Part]:
        """Sorts parts of different parameters into the order in which Chainer calls hooks."""
        by_name = {part.name: part for part in parts}
        return [
            by_name[name] for name in dict.fromkeys(self.model.names_in_order) if name in by_name
        ]


def _gather_whole_gradients(buffers: FlatBuffers, collectives: Collectives) -> None:
    collectives.all_gather(buffers.flat_grad, buffers.group.buckets)
    buffers.expose_flat_grad()


def _whole(name: str, param: chainer.Parameter) -> hooks.Part:
    itself = [WholeParameter(param)]
    return hooks.Part(name, param.update_rule, itself, itself, ())

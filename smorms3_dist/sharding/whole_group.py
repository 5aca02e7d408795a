"""The update of parameters whose rules are left to themselves, and the moving of states.

Every rank holds the whole states of such parameters, in the rules, where Chainer keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.kernels.segments import MASTER
from smorms3_dist.layout import Segment, Slot
from smorms3_dist.sharding import rules
from smorms3_dist.sharding.buffers import FlatBuffers
from smorms3_dist.sharding.group import ShardedGroup

import chainer
import numpy as np

_MOVED_AT_ONCE = 1 << 18


class WholeGroup:
    """The update of a group by its rules' own code, on every rank.

    Args:
        buffers: The flat buffers of the group.
        plan: How its parameters are updated.

    Attributes:
        buffers: The flat buffers.
        plan: How the parameters are updated.
    """

    def __init__(self, buffers: FlatBuffers, plan: rules.Plan) -> None:
        self.buffers = buffers
        self.plan = plan

    @property
    def nbytes(self) -> int:
        """Bytes of the states that this rank holds, fp32 masters included."""
        total = 0
        for param in self.buffers.params:
            rule = param.update_rule
            if isinstance(rule, chainer.UpdateRule):
                arrays = list((rule._state or {}).values())
                if rule._fp32_param is not None:
                    arrays.append(rule._fp32_param.array)
                total += sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))
        return total

    def put(self, name: str, index: int, start: int, stop: int, values: np.ndarray) -> None:
        """Overwrites a state of a range of a parameter; see `ShardedGroup.put`."""
        param = self.buffers.params[index]
        rule = param.update_rule
        if name == MASTER:
            if rule._fp32_param is None:
                rule._fp32_param = chainer.Parameter(
                    param.array.astype(values.dtype), name=param.name
                )
            whole = rule._fp32_param.array
        else:
            rule._state = rule._state or {}
            fresh = self.buffers.memory.empty(
                param.size, values.dtype, f"the state {name} of parameter {param.name}"
            ).reshape(param.shape)
            whole = rule._state.setdefault(name, fresh)
        whole.reshape(-1)[start:stop] = values

    def update(self, paths: Mapping[str, int], loss_scale: float | None) -> None:
        """Runs one step of every parameter's rule.

        Args:
            paths: How many paths of the link lead to a parameter, by name.
            loss_scale: What gradients are still to be divided by, or ``None``.
        """
        for slot, param in zip(self.buffers.group.slots, self.buffers.params, strict=True):
            # A rank on which the parameter was not used has not noted the scale.
            param._loss_scale = loss_scale
            for _ in range(paths[slot.name]):
                param.update()
                param._loss_scale = None


def move_states(
    old: Sequence[ShardedGroup | WholeGroup],
    new: Sequence[ShardedGroup | WholeGroup],
    collectives: Collectives,
) -> None:
    """Carries the states of the parameters that are still there into a new layout. Collective.

    A parameter keeps its states if it is the same object with the same update rule, shape and dtype
    on every rank; under which name does not matter.

    Args:
        old: The updates of the old layout.
        new: Those of the new one, whose states are overwritten.
        collectives: The ranks.
    """
    if not old:
        return
    # Whole states are with the rules, where the new update finds them.
    sharded = [update for update in old if isinstance(update, ShardedGroup)]
    moves = set.intersection(
        *collectives.all_gather_object(
            {move for update in sharded for move in _moves(update, new).items()}
        )
    )
    places = {slot.name: (update, slot.index) for update in new for slot in _slots(update)}
    targets = {before: places[after] for before, after in moves}
    for update in sharded:
        for shard in update.buffers.group.shards:
            for piece in shard.pieces(_MOVED_AT_ONCE):
                for segment in piece.segments:
                    if segment.slot.name in targets:
                        target, index = targets[segment.slot.name]
                        _move(update, shard.rank, segment, target, index, collectives)


def _move(
    source: ShardedGroup,
    owner: int,
    segment: Segment,
    target: ShardedGroup | WholeGroup,
    index: int,
    collectives: Collectives,
) -> None:
    for name, state in source.states.items():
        if collectives.rank == owner:
            values = state[segment.shard]
        else:
            what = f"the state {name} of rank {owner} on its way to a new layout"
            values = source.buffers.memory.empty(segment.size, state.dtype, what)
        collectives.broadcast(values, owner)
        if isinstance(target, WholeGroup) or name in target.states:
            target.put(name, index, segment.start, segment.stop, values)


def _moves(source: ShardedGroup, new: Sequence[ShardedGroup | WholeGroup]) -> dict[str, str]:
    """New names of the parameters whose states go over, by their old names."""
    places = {
        id(param): (update, slot)
        for update in new
        for slot, param in zip(_slots(update), update.buffers.params, strict=True)
    }
    states = {name for name, _ in source.plan.states}
    moves = {}
    for slot, param in zip(_slots(source), source.buffers.params, strict=True):
        target, place = places.get(id(param), (None, slot))
        if (
            target is not None
            and source.has_states_of(slot.index)
            and target.buffers.group.dtype == source.buffers.group.dtype
            and place.shape == slot.shape
            and (
                isinstance(target, WholeGroup) or states == {name for name, _ in target.plan.states}
            )
        ):
            moves[slot.name] = place.name
    return moves


def _slots(update: ShardedGroup | WholeGroup) -> Sequence[Slot]:
    return update.buffers.group.slots

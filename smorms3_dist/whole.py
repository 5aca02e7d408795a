"""The update of parameters whose rules are left to themselves, and the moving of states.

Every rank holds the whole states of such parameters, in the rules, where Chainer keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from smorms3_dist import rules
from smorms3_dist.buffers import FlatBuffers
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.update import MASTER, ShardUpdate

import chainer
import numpy as np

_MOVED_AT_ONCE = 1 << 18


class WholeUpdate:
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
        """Overwrites a state of a range of a parameter; see `ShardUpdate.put`."""
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
            whole = rule._state.setdefault(name, np.empty(param.shape, values.dtype))
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
    old: Sequence[ShardUpdate | WholeUpdate],
    new: Sequence[ShardUpdate | WholeUpdate],
    collectives: Collectives,
) -> None:
    """Carries the states of the parameters that are still there into a new layout. Collective.

    A parameter keeps its states if it is the same object with the same update rule, shape and dtype
    on every rank.

    Args:
        old: The updates of the old layout.
        new: Those of the new one, whose states are overwritten.
        collectives: The ranks.
    """
    if not old:
        return
    places = {
        slot.name: (update, slot.index) for update in new for slot in update.buffers.group.slots
    }
    kept = set.intersection(
        *collectives.all_gather_object(
            # Whole states are with the rules, where the new update finds them.
            {name for u in old if isinstance(u, ShardUpdate) for name in _kept(u, places)}
        )
    )
    for update in old:
        if isinstance(update, ShardUpdate):
            for shard in update.buffers.group.shards:
                for piece in shard.pieces(_MOVED_AT_ONCE):
                    for segment in piece.segments:
                        if segment.slot.name in kept:
                            target, index = places[segment.slot.name]
                            for name, state in update.states.items():
                                if collectives.rank == shard.rank:
                                    values = state[segment.shard_start : segment.shard_stop]
                                else:
                                    values = np.empty(segment.size, state.dtype)
                                collectives.broadcast(values, shard.rank)
                                if isinstance(target, WholeUpdate) or name in target.states:
                                    target.put(name, index, segment.start, segment.stop, values)


def _kept(
    update: ShardUpdate, places: Mapping[str, tuple[ShardUpdate | WholeUpdate, int]]
) -> set[str]:
    """Names of the parameters whose states in an old update go over into the new layout."""
    names = set()
    states = {name for name, _ in update.plan.states}
    for slot, param in zip(update.buffers.group.slots, update.buffers.params, strict=True):
        target, index = places.get(slot.name, (None, 0))
        if (
            target is not None
            and update.has_states_of(slot.index)
            and target.buffers.params[index] is param
            and target.buffers.group.dtype == update.buffers.group.dtype
            and target.buffers.group.slots[index].shape == slot.shape
            and (
                isinstance(target, WholeUpdate)
                or states == {name for name, _ in target.plan.states}
            )
        ):
            names.add(slot.name)
    return names

"""Moving states of parameters into a new layout, segment by segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.kernels.segments import MASTER, follow
from smorms3_dist.layout import Segment, Slot
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.states import IN_FLIGHT
from smorms3_dist.sharding.whole_group import WholeGroup

AnyGroup = ShardedGroup | WholeGroup

_MOVED_AT_ONCE = 1 << 18
"""Elements."""


def move_states(
    old: Sequence[AnyGroup],
    new: Sequence[AnyGroup],
    collectives: Collectives,
) -> None:
    """Carries the states of the parameters that are still there into a new layout. Collective.

    A parameter keeps its states if it is the same object with the same update rule, shape and dtype
    on every rank; under which name does not matter.
    """
    if not old:
        return
    # Whole states are with the rules, where the new update finds them.
    sharded = [group for group in old if isinstance(group, ShardedGroup)]
    moves = set.intersection(
        *collectives.all_gather_object(
            {move for group in sharded for move in _moves(group, new).items()}
        )
    )
    by_name = {slot.name: (group, slot) for group in new for slot, _ in group.parameters()}
    targets = {before: (*by_name[after], arrays) for before, (after, arrays) in moves}
    for group in sharded:
        for shard in group.layout.shards:
            for piece in shard.pieces(_MOVED_AT_ONCE):
                for segment in piece.segments:
                    if segment.slot.name in targets:
                        target, slot, arrays = targets[segment.slot.name]
                        for name in arrays:
                            values = _from_owner(group, shard.rank, segment, name, collectives)
                            _move(group, segment, name, values, target, slot)


def _from_owner(
    source: ShardedGroup, owner: int, segment: Segment, name: str, collectives: Collectives
) -> Any:
    """Gives every rank what the owner has of an array. Collective."""
    state = source.states[name]
    if collectives.rank == owner:
        values = state[segment.range_s]
    else:
        what = f"the state {name} of rank {owner} on its way to a new layout"
        values = source.memory.empty(segment.size, state.dtype, what)
    collectives.broadcast(values, owner)
    return values


def _move(
    source: ShardedGroup, segment: Segment, name: str, values: Any, target: AnyGroup, slot: Slot
) -> None:
    if name == MASTER and source.seen_as is not None and target.plan.seen_as is None:
        # What was rounded for all to see is not any more.
        flat = target.buffers.flat[slot.start_f :][segment.range_p]
        follow(values, flat, source.seen_as, source.memory.empty)
        flat[...] = values
    elif isinstance(target, WholeGroup) or name in target.states:
        target.write_state(name, slot.index, segment.start_p, values)


def _moves(source: ShardedGroup, new: Sequence[AnyGroup]) -> dict[str, tuple[str, tuple[str, ...]]]:
    """What goes over by the old names of parameters: their new names, and the names of arrays."""
    by_identity = {id(param): (group, slot) for group in new for slot, param in group.parameters()}
    states = {name for name, _ in source.plan.states}
    moves = {}
    for slot, param in source.parameters():
        target, new_slot = by_identity.get(id(param), (None, slot))
        if target is not None and target.dtype == source.dtype and new_slot.shape == slot.shape:
            arrays = set(source.has_arrays_of(slot.index))
            if not isinstance(target, WholeGroup) and states != {n for n, _ in target.plan.states}:
                # Gradients are no rule's own.
                arrays &= {IN_FLIGHT}
            if arrays:
                moves[slot.name] = new_slot.name, tuple(sorted(arrays))
    return moves

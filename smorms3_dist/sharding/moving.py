"""Moving states of parameters into a new layout, segment by segment."""

from __future__ import annotations

from collections.abc import Sequence

from smorms3_dist.collectives.base import Collectives
from smorms3_dist.layout import Segment
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.whole_group import WholeGroup

_MOVED_AT_ONCE = 1 << 18
"""Elements."""


def move_states(
    old: Sequence[ShardedGroup | WholeGroup],
    new: Sequence[ShardedGroup | WholeGroup],
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
    by_name = {slot.name: (group, slot.index) for group in new for slot, _ in group.parameters()}
    targets = {before: by_name[after] for before, after in moves}
    for group in sharded:
        for shard in group.layout.shards:
            for piece in shard.pieces(_MOVED_AT_ONCE):
                for segment in piece.segments:
                    if segment.slot.name in targets:
                        target, index = targets[segment.slot.name]
                        _move(group, shard.rank, segment, target, index, collectives)


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
            values = state[segment.range_s]
        else:
            what = f"the state {name} of rank {owner} on its way to a new layout"
            values = source.memory.empty(segment.size, state.dtype, what)
        collectives.broadcast(values, owner)
        if isinstance(target, WholeGroup) or name in target.states:
            target.write_state(name, index, segment.start_p, values)


def _moves(source: ShardedGroup, new: Sequence[ShardedGroup | WholeGroup]) -> dict[str, str]:
    """New names of the parameters whose states go over, by their old names."""
    by_identity = {id(param): (group, slot) for group in new for slot, param in group.parameters()}
    states = {name for name, _ in source.plan.states}
    moves = {}
    for slot, param in source.parameters():
        target, new_slot = by_identity.get(id(param), (None, slot))
        if (
            target is not None
            and source.has_states_of(slot.index)
            and target.dtype == source.dtype
            and new_slot.shape == slot.shape
            and (
                isinstance(target, WholeGroup) or states == {name for name, _ in target.plan.states}
            )
        ):
            moves[slot.name] = new_slot.name
    return moves

"""Giving all ranks what rank 0 has, where they have come to differ."""

from __future__ import annotations

from collections.abc import Collection

from smorms3_dist.chainer_internals.links import persistent_values_of
from smorms3_dist.chainer_internals.optimizers import master_of
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.collectives.sharing import broadcast
from smorms3_dist.device.memory import assign
from smorms3_dist.kernels.segments import MASTER, follow
from smorms3_dist.sharding.group import ShardedGroup
from smorms3_dist.sharding.sharded_model import ShardedModel

import chainer
import numpy as np


def broadcast_parameters(
    sharded: ShardedModel, names: Collection[str], collectives: Collectives
) -> None:
    """Overwrites parameters by those of rank 0, and what is updated in their place. Collective.

    The owner of a shard updates fp32 masters, where there are any, and these would override the
    parameters at the next step. A master that rounds to the new value stays, with the digits that
    the parameter has not; any other becomes that value. The states of the rules stay as they are.
    """
    for group in sharded.groups:
        for slot, param in group.parameters():
            if slot.name not in names or not slot.size:
                continue
            flat = group.buffers.flat[slot.start_f : slot.stop_f]
            broadcast(collectives, flat, group.buffers.is_shared)
            if isinstance(group, ShardedGroup):
                if MASTER in group.has_arrays_of(slot.index):
                    for segment in group.owned(slot.index):
                        master = group.states[MASTER][segment.range_s]
                        follow(master, flat[segment.range_p], group.seen_as, group.memory.empty)
            elif isinstance(param.update_rule, chainer.UpdateRule):
                master = master_of(param.update_rule)
                if master is not None:
                    follow(master.reshape(-1), flat, None, group.memory.empty)


def broadcast_persistent_values(
    link: chainer.Link, names: Collection[str], collectives: Collectives
) -> None:
    """Overwrites persistent values of links by those of rank 0. Collective.

    Args:
        link: The model.
        names: Their paths, alike on all ranks.
        collectives: The ranks.
    """
    values = {
        path: (owner, name) for path, owner, name in persistent_values_of(link) if path in names
    }
    for path in sorted(names):
        mine = None
        if collectives.rank == 0 and path in values:
            owner, name = values[path]
            mine = getattr(owner, name)
            mine = (mine.get() if hasattr(mine, "dtype") and hasattr(mine, "get") else mine,)
        given = collectives.all_gather_object(mine)[0]
        # A value that rank 0 does not have at all is of another model.
        if given is None or path not in values or collectives.rank == 0:
            continue
        owner, name = values[path]
        (value,), old = given, getattr(owner, name)
        if not isinstance(value, np.ndarray):
            setattr(owner, name, value)
        elif getattr(old, "shape", None) == value.shape and old.dtype == value.dtype:
            if old.flags.c_contiguous:
                assign(old, value)
            else:
                old[...] = value
        else:
            setattr(owner, name, owner.device.send(value))

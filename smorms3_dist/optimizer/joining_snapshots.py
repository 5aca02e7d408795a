"""Lets all ranks take part in snapshots that a script for ChainerMN makes on some of them.

Such a script extends rank 0's trainer alone with a snapshot, or all trainers with ChainerMN's
``multi_node_snapshot``, which saves one rank of each of its sets. Before the trainer runs, every
rank gets an extension that helps to bring the states together.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from smorms3_dist.chainer_internals.trainers import (
    entries_of,
    is_snapshot,
    put_before,
    saves_on_error,
    snapshot_of_replica_sets,
    target_of,
)
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.optimizer.rank_zero import Follows, fires_alike, look_of
from smorms3_dist.optimizer.snapshots import Snapshot, has_iterators
from smorms3_dist.step.agreement import NO_FLAGS, Flag, meet

import chainer
from chainer.training import Trainer


class _Alone(NamedTuple):
    """A snapshot extension that one rank's trainer may have alone, as other ranks are told.

    Attributes:
        name: Its name in the trainer.
        priority: Its priority.
        followers: The names of the extensions of the same priority that come after it.
        alike: Whether its trigger fires in iterations that all ranks know.
        look: What says when it may fire, if that is known to all ranks.
        autoload: Whether it loads.
        of_updater: Whether it saves the updater's iterators.
        is_ours: Whether it is this package's.
    """

    name: str
    priority: int
    followers: frozenset[str]
    alike: bool
    look: Any | None
    autoload: bool
    of_updater: bool
    is_ours: bool


class _Told(NamedTuple):
    """What a rank tells the others of its snapshot extensions.

    Attributes:
        alone: Those that it may have alone.
        masters: Of each ``multi_node_snapshot``, by name: the rank that saves for this one.
        faults: For each that cannot work, by name: why, and the remedy.
    """

    alone: list[_Alone]
    masters: dict[str, int]
    faults: dict[str, str]


_OURS = "smorms3_dist.extensions.snapshot(...)"
_REMEDY = f"extend the trainer with {_OURS} on all ranks"


def join_snapshots(trainer: Trainer, collectives: Collectives) -> None:
    """Lets all ranks take part in the snapshots of some ranks. Collective.

    It is called before a trainer with a sharded optimizer runs.

    Raises:
        RuntimeError: If a snapshot would lack states of other ranks and they cannot take part; on
            all ranks.
    """
    alone, of_sets, told = [], [], _Told([], {}, {})
    for entry in entries_of(trainer):
        extension = entry.extension
        name, inner = extension.name, snapshot_of_replica_sets(extension)
        if inner is not None and _has_states(inner):
            of_sets.append(entry)
            told.masters[name] = extension.master
        elif _has_states(extension) and collectives.size > 1:
            alone.append(entry)
            told.alone.append(_describe(trainer, entry))
        else:
            continue
        fault = _fault_of(trainer, inner or extension, collectives)
        if fault is not None:
            told.faults[name] = fault
    occasion = "the start of a Trainer"
    if Flag.WANTED not in meet(collectives, occasion, Flag.WANTED if any(told) else NO_FLAGS):
        return
    everybodys: list[_Told] = collectives.all_gather_object(told)
    _check(everybodys)
    for entry in of_sets:
        masters = [theirs.masters[entry.extension.name] for theirs in everybodys]
        _replace(entry, snapshot_of_replica_sets(entry.extension), masters)
    for entry in alone:
        _replace(entry, entry.extension)
    mine = {own.name for own in told.alone}
    for theirs in everybodys[0].alone:
        if theirs.name not in mine:
            trainer.extend(
                Snapshot(None, None, theirs.autoload, theirs.of_updater, True),
                theirs.name,
                Follows(theirs.alike, theirs.look),
                theirs.priority,
            )
            # Those among them in which ranks meet, all ranks come to in the same order.
            put_before(trainer, theirs.followers)


def _has_states(extension: Any) -> bool:
    """Whether an extension makes snapshots that need all ranks; models are whole on each."""
    if isinstance(extension, Snapshot):
        return True
    return is_snapshot(extension) and not isinstance(target_of(extension), chainer.Link)


def _describe(trainer: Trainer, entry: Any) -> _Alone:
    extension, trigger = entry.extension, entry.trigger
    is_ours = isinstance(extension, Snapshot)
    entries = itertools.dropwhile(lambda other: other is not entry, entries_of(trainer))
    followers = [e.extension.name for e in entries if e.priority == entry.priority]
    return _Alone(
        extension.name,
        entry.priority,
        frozenset(followers[1:]),
        fires_alike(trigger),
        copy.copy(look_of(trigger)),
        bool(extension.autoload),
        extension.of_updater if is_ours else has_iterators(target_of(extension)),
        is_ours,
    )


def _fault_of(trainer: Trainer, extension: Any, collectives: Collectives) -> str | None:
    """Why an extension of Chainer's cannot work, and the remedy."""
    if isinstance(extension, Snapshot) or collectives.size == 1:
        return None
    if saves_on_error(extension):
        return (
            "snapshot_on_error=True saves when other ranks may have failed. Leave it out, and use "
            "smorms3_dist.ShardedCheckpoint, often"
        )
    if extension.autoload and target_of(extension) not in (None, trainer):
        return f"with autoload=True, other ranks do not know what to load it into: {_REMEDY}"
    return None


def _check(everybodys: Sequence[_Told]) -> None:
    """Raises an error, naming the rank and the extension, if one cannot work."""
    of_rank_0 = {alone.name for alone in everybodys[0].alone}
    for rank, theirs in enumerate(everybodys):
        faults = dict(theirs.faults)
        for alone in theirs.alone:
            if rank != 0 and not (alone.is_ours and alone.name in of_rank_0):
                faults[alone.name] = (
                    f"rank 0 has none of that name: {_REMEDY}"
                    if alone.is_ours
                    else "Chainer's snapshot extension works on rank 0 alone. Add it there, or "
                    f"{_REMEDY}"
                )
        for name in theirs.masters:
            lacking = [r for r, other in enumerate(everybodys) if name not in other.masters]
            if lacking:
                faults[name] = (
                    f"rank {lacking[0]} has none of that name. Extend the trainer with "
                    "multi_node_snapshot on all ranks"
                )
        for name, fault in faults.items():
            raise RuntimeError(
                f"the extension {name!r} of rank {rank} cannot save the optimizer states, which "
                f"lie on all ranks: {fault}"
            )


def _replace(entry: Any, inner: Any, masters: Sequence[int] | None = None) -> None:
    """Puts snapshots of all ranks in the place of a trainer's extension."""
    if not isinstance(inner, Snapshot):
        condition, autoload = inner.condition, inner.autoload
        inner.condition, inner.autoload = _always, False
        inner = Snapshot(inner, condition, autoload, has_iterators(target_of(inner)), True)
        inner.name = entry.extension.name
    if masters is not None:
        inner.name, inner.masters = entry.extension.name, masters
    entry.extension = inner


def _always() -> bool:
    return True

"""Snapshots in Chainer's own format, in which all ranks take part.

`Snapshot` brings the states of all ranks together on rank 0, where an extension of Chainer's writes
them. `join_snapshots_of_rank_zero` lets all ranks take part in those of a script that has extended
rank 0's trainer alone, as one for ChainerMN does.
"""

from __future__ import annotations

import copy
import itertools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from smorms3_dist.chainer_internals import (
    entries_of,
    is_snapshot,
    iterators_of,
    newest_snapshot,
    put_before,
    saves_on_error,
    snapshot_of_replica_sets,
    target_of,
)
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.optimizer.end_of_training import EndOfTraining
from smorms3_dist.optimizer.of_trainer import sharded_optimizers_of
from smorms3_dist.optimizer.optimizer import ShardedOptimizer
from smorms3_dist.optimizer.rank_zero import AsRankZero, Follows, as_rank_zero, fires_alike, look_of
from smorms3_dist.step.agreement import NO_FLAGS, Flag, meet

import chainer
import numpy as np
from chainer import serializers
from chainer.training import Extension, Trainer, Updater
from chainer.training.extensions.snapshot_writers import SimpleWriter


class Snapshot(Extension):
    """Snapshots in which all ranks take part.

    Args:
        inner: Chainer's extension, which saves on rank 0; other ranks may have none.
        condition: Called on rank 0; no snapshot is made where it returns false.
        autoload: Whether all ranks load the newest snapshot before training starts.
        of_updater: Whether what is saved has the updater's iterators.
        check_sync: Whether the ranks are compared at the end of the training.
    """

    trigger = 1, "epoch"
    priority = -100

    def __init__(
        self,
        inner: Extension | None,
        condition: Callable[[], bool] | None,
        autoload: bool,
        of_updater: bool,
        check_sync: bool,
    ) -> None:
        self._inner = inner
        self._condition = condition
        self._autoload = autoload
        self._of_updater = of_updater
        self._check_sync = check_sync
        self._end = EndOfTraining()
        if inner is not None and not isinstance(inner.writer, (SimpleWriter, _Copying)):
            inner.writer = _Copying(inner.writer)

    def initialize(self, trainer: Trainer) -> None:
        """Loads the newest snapshot if that was asked for. Collective."""
        self._end.expect(trainer)
        sharded = next(iter(sharded_optimizers_of(trainer).values()))
        if self._autoload:
            self._load(trainer, sharded)
        for entry in entries_of(trainer):
            if entry.extension is not self:
                continue
            if self._autoload:
                # What is loaded has rank 0's trigger, under a name that others need not have.
                mine = copy.copy(look_of(entry.trigger)) if sharded.collectives.rank == 0 else None
                look = sharded.collectives.all_gather_object(mine)[0]
                if isinstance(entry.trigger, Follows):
                    entry.trigger = Follows(entry.trigger.alike, look)
            if not isinstance(entry.trigger, (Follows, AsRankZero)):
                entry.trigger = as_rank_zero(entry.trigger)
        if sharded.collectives.rank == 0:
            assert self._inner is not None
            self._inner.initialize(trainer)

    def __call__(self, trainer: Trainer) -> None:
        """Makes a snapshot. Collective."""
        sharded = list(sharded_optimizers_of(trainer).values())
        collectives = sharded[0].collectives
        wanted = collectives.rank == 0 and (self._condition is None or self._condition())
        if Flag.WANTED not in meet(collectives, "a snapshot", Flag.WANTED if wanted else NO_FLAGS):
            return
        for optimizer in sharded:
            optimizer.consolidate()
        if collectives.rank == 0:
            assert self._inner is not None
            self._inner(trainer)
        elif self._of_updater:
            # ChainerMN's multi-node iterators want to be saved on all ranks together.
            for iterator in iterators_of(trainer.updater).values():
                if hasattr(iterator, "rank_master"):
                    iterator.serialize(serializers.DictionarySerializer())
        for optimizer in sharded:
            optimizer.release_consolidated()

    def on_error(self, trainer: Trainer, exc: Exception, tb: Any) -> None:
        """Notes that the ranks will not meet again."""
        self._end.give_up()

    def finalize(self) -> None:
        """Waits for the writer; then compares the ranks, if the training has ended well."""
        if self._inner is not None:
            self._inner.finalize()
        if self._check_sync:
            self._end.check_sync()

    def _load(self, trainer: Trainer, optimizer: ShardedOptimizer) -> None:
        collectives = optimizer.collectives
        path = None
        if collectives.rank == 0:
            assert self._inner is not None
            name = newest_snapshot(self._inner.filename, trainer.out)
            path = None if name is None else Path(trainer.out) / name
        path = collectives.all_gather_object(path)[0]
        if path is None:
            return
        blind = collectives.all_gather_object(None if path.is_file() else socket.gethostname())
        for rank, host in enumerate(blind):
            if host is not None:
                raise RuntimeError(
                    f"rank {rank} on {host} does not see the snapshot {path}, which rank 0 has "
                    "found. Let the output directory be one that all hosts share"
                )
        target = None if self._inner is None else target_of(self._inner)
        with _SnapshotFile(path) as file:
            serializers.NpzDeserializer(file).load(trainer if target is None else target)


class _SnapshotFile:
    """The arrays of a snapshot by key, each read when asked for.

    ChainerMN's multi-node iterators send it to other ranks, which open the file themselves.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = np.load(path, allow_pickle=True)

    def __enter__(self) -> _SnapshotFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def __reduce__(self) -> Any:
        return _SnapshotFile, (self._path,)

    def __contains__(self, key: str) -> bool:
        return key in self._file

    def __getitem__(self, key: str) -> Any:
        return self._file[key]


def has_iterators(target: Any) -> bool:
    """Whether the target of a snapshot, of which ``None`` is the trainer, has its iterators."""
    return target is None or isinstance(target, (Trainer, Updater))


class _Copying:
    """A snapshot writer that hands over copies, because training changes arrays in place."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __call__(self, filename: str, outdir: str, target: dict[str, Any]) -> None:
        self._writer(filename, outdir, {key: np.array(value) for key, value in target.items()})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)


# Snapshots of a rank alone


class _Alone(NamedTuple):
    """A snapshot extension that one rank's trainer has, as other ranks are told.

    Attributes:
        name: Its name in the trainer.
        priority: Its priority.
        followers: The names of the extensions of the same priority that come after it.
        alike: Whether its trigger fires in iterations that all ranks know.
        look: What says when it may fire, if that is known to all ranks.
        autoload: Whether it loads.
        of_updater: Whether it saves the updater's iterators.
        fault: Why the other ranks cannot take part, and the remedy; or ``None``.
    """

    name: str
    priority: int
    followers: frozenset[str]
    alike: bool
    look: Any | None
    autoload: bool
    of_updater: bool
    fault: str | None


_OURS = "smorms3_dist.extensions.snapshot(...)"
_REMEDY = f"extend the trainer with {_OURS} on all ranks"


def join_snapshots_of_rank_zero(trainer: Trainer, collectives: Collectives) -> None:
    """Lets all ranks take part in the snapshots of rank 0. Collective.

    It is called before a trainer with a sharded optimizer runs.

    Raises:
        RuntimeError: If a snapshot would lack states of other ranks and they cannot take part; on
            all ranks.
    """
    if collectives.size == 1:
        return
    entries = [e for e in entries_of(trainer) if _needs_all_ranks(trainer, e.extension)]
    mine = [_describe(trainer, entry, collectives.rank) for entry in entries]
    occasion = "the start of a Trainer"
    if Flag.WANTED not in meet(collectives, occasion, Flag.WANTED if mine else NO_FLAGS):
        return
    everybodys: list[list[_Alone]] = collectives.all_gather_object(mine)
    for rank, theirs in enumerate(everybodys):
        for alone in theirs:
            if alone.fault is not None:
                raise RuntimeError(
                    f"the extension {alone.name!r} of rank {rank} cannot save the optimizer "
                    f"states, which lie on all ranks: {alone.fault}"
                )
    for entry in entries:
        inner = entry.extension
        condition, autoload = inner.condition, inner.autoload
        inner.condition, inner.autoload = _always, False
        of_updater = has_iterators(target_of(inner))
        entry.extension = Snapshot(inner, condition, autoload, of_updater, True)
        entry.extension.name = inner.name
    if collectives.rank != 0:
        for alone in everybodys[0]:
            trainer.extend(
                Snapshot(None, None, alone.autoload, alone.of_updater, True),
                alone.name,
                Follows(alone.alike, alone.look),
                alone.priority,
            )
            # Those among them in which ranks meet, all ranks come to in the same order.
            put_before(trainer, alone.followers)


def _always() -> bool:
    return True


def _needs_all_ranks(trainer: Trainer, extension: Any) -> bool:
    inner = snapshot_of_replica_sets(extension) or extension
    # Models are whole on every rank.
    return is_snapshot(inner) and not isinstance(target_of(inner), chainer.Link)


def _describe(trainer: Trainer, entry: Any, rank: int) -> _Alone:
    extension, trigger = entry.extension, entry.trigger
    inner = snapshot_of_replica_sets(extension)
    fault = None
    if inner is not None:
        fault = (
            "ChainerMN's multi_node_snapshot saves one rank of each replica set. In its place, on "
            f"all ranks, extend the trainer with {_OURS}, for rank 0's trainer with whole states, "
            "or with smorms3_dist.ShardedCheckpoint, for that of each rank"
        )
    elif rank != 0:
        fault = f"Chainer's snapshot extension works on rank 0 alone. Add it there, or {_REMEDY}"
    elif saves_on_error(extension):
        fault = (
            "snapshot_on_error=True saves when other ranks may have failed. Leave it out, and use "
            "smorms3_dist.ShardedCheckpoint, often"
        )
    elif extension.autoload and target_of(extension) not in (None, trainer):
        fault = f"with autoload=True, other ranks do not know what to load it into: {_REMEDY}"
    snapshot = inner or extension
    entries = itertools.dropwhile(lambda other: other is not entry, entries_of(trainer))
    followers = [e.extension.name for e in entries if e.priority == entry.priority]
    return _Alone(
        extension.name,
        entry.priority,
        frozenset(followers[1:]),
        fires_alike(trigger),
        copy.copy(look_of(trigger)),
        bool(snapshot.autoload),
        has_iterators(target_of(snapshot)),
        fault,
    )

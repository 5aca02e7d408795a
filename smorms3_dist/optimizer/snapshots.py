"""Snapshots in Chainer's own format, in which all ranks take part.

`Snapshot` brings the states of all ranks together on rank 0, where an extension of Chainer's writes
them; or, one after the other, on each of the ranks that save for a set of ranks.
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smorms3_dist.chainer_internals.trainers import (
    entries_of,
    iterators_of,
    newest_snapshot,
    target_of,
)
from smorms3_dist.collectives.base import Collectives
from smorms3_dist.optimizer.end_of_training import EndOfTraining
from smorms3_dist.optimizer.of_trainer import sharded_optimizers_of
from smorms3_dist.optimizer.rank_zero import AsRankZero, Follows, as_rank_zero, look_of
from smorms3_dist.step.agreement import NO_FLAGS, Flag, meet

import numpy as np
from chainer import serializers
from chainer.training import Extension, Trainer, Updater
from chainer.training.extensions.snapshot_writers import SimpleWriter


class Snapshot(Extension):
    """Snapshots in which all ranks take part.

    Args:
        inner: Chainer's extension, which saves on masters; other ranks may have none.
        condition: Called on masters; no snapshot is made where it returns false.
        autoload: Whether all ranks load their master's newest snapshot before training starts.
        of_updater: Whether what is saved has the updater's iterators.
        check_sync: Whether the ranks are compared at the end of the training.

    Attributes:
        autoload: As given.
        of_updater: As given.
        masters: The master of each rank, which saves for it: rank 0, unless the ranks are divided
            into ChainerMN's replica sets.
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
        self.autoload = autoload
        self.of_updater = of_updater
        self._check_sync = check_sync
        self.masters: Sequence[int] | None = None
        self._end = EndOfTraining()
        if inner is not None and not isinstance(inner.writer, (SimpleWriter, _Copying)):
            inner.writer = _Copying(inner.writer)

    @property
    def filename(self) -> Any:
        """The name of its files, to which ChainerMN's ``multi_node_snapshot`` appends the rank."""
        return getattr(self._inner, "filename", None)

    @filename.setter
    def filename(self, name: Any) -> None:
        assert self._inner is not None
        self._inner.filename = name

    def initialize(self, trainer: Trainer) -> None:
        """Loads the newest snapshot if that was asked for. Collective."""
        self._end.expect(trainer)
        sharded = next(iter(sharded_optimizers_of(trainer).values()))
        if self.autoload:
            self._load(trainer, sharded.collectives)
        for entry in entries_of(trainer):
            if entry.extension is not self:
                continue
            if self.autoload:
                # What is loaded has rank 0's trigger, under a name that others need not have.
                mine = copy.copy(look_of(entry.trigger)) if sharded.collectives.rank == 0 else None
                look = sharded.collectives.all_gather_object(mine)[0]
                if isinstance(entry.trigger, Follows):
                    entry.trigger = Follows(entry.trigger.alike, look)
            if not isinstance(entry.trigger, (Follows, AsRankZero)):
                entry.trigger = as_rank_zero(entry.trigger)
        if sharded.collectives.rank in self._masters_of(sharded.collectives):
            assert self._inner is not None
            self._inner.initialize(trainer)

    def __call__(self, trainer: Trainer) -> None:
        """Makes a snapshot. Collective."""
        sharded = list(sharded_optimizers_of(trainer).values())
        collectives = sharded[0].collectives
        masters = self._masters_of(collectives)
        wanted = collectives.rank in masters and (self._condition is None or self._condition())
        if Flag.WANTED not in meet(collectives, "a snapshot", Flag.WANTED if wanted else NO_FLAGS):
            return
        for master in sorted(set(masters)):
            for optimizer in sharded:
                optimizer.consolidate(master)
            if wanted and collectives.rank == master:
                assert self._inner is not None
                self._inner(trainer)
            elif self.of_updater:
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

    def _masters_of(self, collectives: Collectives) -> Sequence[int]:
        return self.masters or [0] * collectives.size

    def _load(self, trainer: Trainer, collectives: Collectives) -> None:
        masters = self._masters_of(collectives)
        path = None
        if collectives.rank in masters:
            assert self._inner is not None
            name = newest_snapshot(self._inner.filename, trainer.out)
            path = None if name is None else Path(trainer.out) / name
        found = collectives.all_gather_object(path)
        paths = [found[master] for master in masters]
        if not any(paths):
            return
        path = paths[collectives.rank]
        if None in paths:
            master = masters[paths.index(None)]
            raise RuntimeError(
                f"rank {master} has no snapshot in {trainer.out} to load, but rank "
                f"{next(m for m in masters if found[m])} has {next(filter(None, paths))}. Start as "
                "many ranks, in as many replica sets, as have made the snapshots, or move these "
                "away"
            )
        blind = collectives.all_gather_object(None if path.is_file() else socket.gethostname())
        for rank, host in enumerate(blind):
            if host is not None:
                raise RuntimeError(
                    f"rank {rank} on {host} does not see the snapshot {paths[rank]}, which rank "
                    f"{masters[rank]} has found. Let the output directory be one that all hosts "
                    "share"
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

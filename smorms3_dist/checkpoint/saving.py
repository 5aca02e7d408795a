"""Saving one step of all ranks together: a copy at once, the disk in the background, one commit.

A save has phases, which all ranks go through alike: every rank *writes* its files, the leaders
*commit* them, then they *retain* what is to be kept (`Saver._write_commit_retain`). What takes time
runs in a thread, which never communicates. The ranks go from phase to phase between the steps of
the training, when the flags that they exchange anyway say that no thread is busy any more. What the
user wants done after the save is the end of the last phase: no save removes the step meanwhile.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from smorms3_dist.checkpoint import trainer_state
from smorms3_dist.checkpoint.arrays import HostCopies
from smorms3_dist.checkpoint.background_work import BackgroundWork
from smorms3_dist.checkpoint.files import manifest_json
from smorms3_dist.checkpoint.files.directory import CheckpointDirectory, new_token
from smorms3_dist.checkpoint.files.errors import CheckpointError
from smorms3_dist.checkpoint.files.manifest import FileRecord, Manifest
from smorms3_dist.checkpoint.files.strict_json import LARGEST
from smorms3_dist.checkpoint.files.worth import NOTE, BestStep, Worth
from smorms3_dist.checkpoint.files.writing import write_rank, write_shard
from smorms3_dist.checkpoint.iterators import positions_of
from smorms3_dist.checkpoint.keeping import AfterSave, Keeping, do_after_save, worth_of
from smorms3_dist.checkpoint.lineage import Lineage
from smorms3_dist.checkpoint.model_state import (
    Optimizers,
    SavedGroup,
    groups_of,
    hyperparameters_of,
    notes_of,
    rules_of,
    saved_groups,
    versions,
)
from smorms3_dist.checkpoint.together import together
from smorms3_dist.checkpoint.unsaved import with_unsaved
from smorms3_dist.optimizer.on_device import device_of
from smorms3_dist.phases import Phase, Phases, in_phase
from smorms3_dist.rank_page import note_saved
from smorms3_dist.step.agreement import NO_FLAGS, Flag, meet

_logger = logging.getLogger(__name__)

_PATIENCE_S = 5.0
"""How long a job that ends anyway waits for the disk."""


class Saver:
    """Saves into one directory, one step at a time. All ranks make and use it alike.

    Args:
        directory: The directory. It may be one that all hosts share, or one of each host's own.
        optimizers: The optimizers whose models are saved, by name.

    Attributes:
        directory: The directory.
        keeping: Which steps are kept.
        after_save: Is called on rank 0 with each step that is whole, and with its directory.
        check_sync: Whether models that differ between ranks are not saved.
        stalled_s: Seconds that the training has waited for the comparison and the copies of the
            last save, or for all of it if that was not asynchronous.
        waited_s: Seconds that it has waited, at the last save, for the one before to end.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        optimizers: Optimizers,
    ) -> None:
        self.keeping = Keeping()
        self.after_save: AfterSave | None = None
        self._optimizers = optimizers
        self._first = next(iter(optimizers.values()))
        self._collectives = self._first.collectives
        self._host = socket.gethostname()
        self._files = CheckpointDirectory(directory, self._host)
        self._best = BestStep(self._files)
        self._said: set[str] = set()
        self.directory = self._files.path
        self._lineage = Lineage.of(self._first, directory)
        # The steps that this save sets aside here.
        self._aside: list[int] = []
        self._copies = HostCopies()
        self.check_sync = True
        self.stalled_s = self.waited_s = 0.0
        # What all ranks know of the directory from the first save on.
        self._local: bool | None = None
        self._leads = False
        self._token = ""
        self._saves = 0
        # The save on its way: its manifest, its phases, and what this rank does in the present one.
        self._manifest: Manifest | None = None
        self._phases: Iterator[None] = iter(())
        self._work: BackgroundWork | None = None
        self._first.ask_before_each_step(self)

    @property
    def phases(self) -> Phases:
        """Where the time of this rank goes."""
        return self._collectives.phases

    @property
    def saving(self) -> int | None:
        """The step that is being saved, or ``None``."""
        return None if self._manifest is None else self._manifest.step

    def saves(self, directory: str | os.PathLike[str], optimizers: Optimizers) -> bool:
        """Whether this is what saves these optimizers into a directory."""
        same = os.path.abspath(self.directory) == os.path.abspath(directory)
        return same and self._optimizers == optimizers

    @in_phase(Phase.CHECKPOINT)
    def save(
        self,
        step: int,
        objects: Mapping[str, Any],
        asynchronous: bool,
        overwrite: bool = False,
        values: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves a step, or begins to; ends what is still being saved first. Collective.

        Args:
            step: The step.
            objects: What is saved of each rank besides parameters and states, by name.
            asynchronous: Whether to come back as soon as everything is copied. Otherwise host
                memory is written as it is, without a copy, and the step is there at the end.
            overwrite: Whether steps of another training are set aside. Otherwise nothing is saved
                where one of them would be replaced, or be newer.
            values: Among which rank 0 finds what the step is worth; ``None`` if none is expected.

        Raises:
            CheckpointError: If it cannot be done, on all ranks, naming the one that cannot.
            RuntimeError: If the ranks' parameters differ, and this is looked at.
            ValueError: If the step is negative, or too large for a manifest.
        """
        if not 0 <= step <= LARGEST:
            raise ValueError(f"a step is from 0 to {LARGEST}, not {step}")
        # First of all: it finds out whether all ranks save.
        how = "the asynchronous save" if asynchronous else "the save"
        how += " (overwrite=True)" if overwrite else ""
        for optimizer in self._optimizers.values():
            optimizer.lay_out(f"{how} of step {step}")
        start = time.perf_counter()
        self._wait()
        self.waited_s = time.perf_counter() - start
        start = time.perf_counter()
        if self.check_sync:
            for optimizer in self._optimizers.values():
                optimizer.check_sync()
        with together(self._collectives, self.directory), self.phases.beside("checkpoint copy"):
            groups = saved_groups(self._optimizers)
            chunks = self._copies.copy(self._optimizers, groups, in_place=not asynchronous)
            models = [optimizer.sharded_model for optimizer in self._optimizers.values()]
            everything = with_unsaved({**objects, **rules_of(self._optimizers)})
            state = trainer_state.copy_state(everything, models)
            worth = self._worth(step, values)
        copied_s = time.perf_counter() - start
        notes = positions_of(objects) | ({} if worth is None else {NOTE: worth._asdict()})
        # Rank 0's, because hosts that have directories of their own must commit the same.
        mine = self._describe(step, groups, notes) if self._collectives.rank == 0 else None
        self._manifest = self._collectives.all_gather_object(mine)[0]
        _unfinished.add(self)
        try:
            saving = self._begin(step, overwrite)
        except BaseException:
            self._abort()
            raise
        rank, host = self._collectives.rank, self._host
        described = self._manifest.groups

        keep_best, aside = self.keeping.best if rank == 0 else None, list(self._aside)

        def write() -> tuple[list[FileRecord], int | None]:
            metadata = {"step": str(step)}
            shard = write_shard(saving, rank, host, described, chunks, metadata)
            rest = write_rank(saving, rank, host, state.arrays, {**state.metadata, **metadata})
            best = None
            if keep_best is not None:
                best = self._best.find(*keep_best, {step: worth}, aside)
            return [shard, rest], best

        self._phases = self._write_commit_retain(write, asynchronous)
        next(self._phases)
        if not asynchronous:
            self._wait()
        self.stalled_s = copied_s if asynchronous else time.perf_counter() - start

    def _write_commit_retain(
        self, write: Callable[[], tuple[list[FileRecord], int | None]], in_thread: bool
    ) -> Iterator[None]:
        """The phases of a save, which begin and end on all ranks alike. Collective.

        At each ``yield``, this rank's work of the phase has begun, in a thread or not. `proceed`
        resumes it, at a step of the training, as soon as no rank has work to do; or `wait` does.
        """
        assert self._manifest is not None
        beside = self.phases.beside
        self._work = work = BackgroundWork(beside("checkpoint write")(write), in_thread)
        del write  # and with it, what has been copied
        yield
        results = self._collectives.all_gather_object(work.result)
        files = [file for of_rank, _ in results for file in of_rank]
        # Rank 0 has looked, for all hosts alike.
        best = results[0][1]
        self._manifest = manifest = dataclasses.replace(self._manifest, files=tuple(files))
        token = self._token_of_save
        self._lineage.note_saving(manifest.step)
        self._work = None
        if self._leads:
            commit = beside("checkpoint commit")(self._commit)
            self._work = BackgroundWork(lambda: commit(token, manifest), in_thread)
        yield
        self._lineage.note_saved(manifest.step)
        protect = [manifest.step] if best is None else [manifest.step, best]
        calls = self._collectives.rank == 0 and self.after_save is not None
        self._work = None
        if calls or (self._leads and self.keeping.last is not None):
            retain = beside("checkpoint retain")(self._retain)
            self._work = BackgroundWork(lambda: retain(manifest.step, protect), in_thread)
        yield
        self._end()

    def _commit(self, token: str, manifest: Manifest) -> None:
        # First: without the new step, the newest is the one from which this training went on.
        self._files.set_aside(self._aside)
        self._files.commit(token, manifest)
        note_saved(manifest.step)

    def _retain(self, step: int, protect: Sequence[int]) -> None:
        if self._leads and self.keeping.last is not None:
            self._files.retain(self.keeping.last, self.keeping.every, protect)
        if self._collectives.rank == 0 and self.after_save is not None:
            # A thread begins with GPU 0.
            with device_of(self._first):
                do_after_save(self.after_save, step, self._files.path_of(step))

    @in_phase(Phase.CHECKPOINT)
    def wait(self, occasion: str = "the wait for a save") -> None:
        """Waits until nothing is being saved any more. Collective.

        Args:
            occasion: What for, alike on all ranks.

        Raises:
            CheckpointError: If the save has failed, on all ranks, naming the one where it did.
            RuntimeError: If other ranks make a step instead, or do something else, or have ended.
        """
        if self._manifest is not None:
            meet(self._collectives, occasion)
            self._wait()

    def _wait(self) -> None:
        while self._manifest is not None:
            self._end_phase()

    def close(self) -> None:
        """Gives up the directory, and what is still being saved. It may be called again.

        If a disk does not come to an end within seconds, the directory stays locked and the thread
        is left to it, so that the job can end.
        """
        if self._work is not None and not self._work.join(_PATIENCE_S):
            _logger.warning(
                "%s is still being written to, and is left locked until this process ends",
                self.directory,
            )
            _unfinished.discard(self)
            return
        if self._manifest is not None:
            self._abort()
        self._files.close()
        self._copies = HostCopies()

    def lock(self, first: int = LARGEST, overwrite: bool = False) -> None:
        """Makes sure that no other job writes into the directory. Collective.

        Args:
            first: The first step that may be saved.
            overwrite: As for `save`.

        Raises:
            CheckpointError: If another one does, on all ranks; or if what is there is of another
                training, so that `save` would refuse.
            RuntimeError: If other ranks make a step instead.
        """
        meet(self._collectives, "the lock of a checkpoint directory")
        with together(self._collectives, self.directory):
            if self._collectives.rank == 0:
                self._files.lock()
                self._look_for_strangers(first, overwrite)

    def flags(self) -> Flag:
        """See `smorms3_dist.step.agreement.Background`."""
        if self._work is None:
            return NO_FLAGS
        if self._work.is_running:
            return Flag.BUSY
        return Flag.FAILED if self._work.error is not None else NO_FLAGS

    @in_phase(Phase.CHECKPOINT)
    def proceed(self, flags: Flag) -> None:
        """See `smorms3_dist.step.agreement.Background`."""
        if self._manifest is None:
            return
        if Flag.FAILED in flags:
            self._end_phase()
        elif Flag.BUSY not in flags:
            next(self._phases, None)

    def _end_phase(self) -> None:
        """Waits for the end of a phase, and goes on to the next, or fails. Collective."""
        if self._work is not None:
            self._work.join()
        try:
            with together(self._collectives, self.directory):
                if self._work is not None and self._work.error is not None:
                    raise self._work.error
        except BaseException:
            self._abort()
            raise
        next(self._phases, None)

    def _end(self) -> None:
        self._manifest, self._phases, self._work = None, iter(()), None
        _unfinished.discard(self)

    def _abort(self) -> None:
        assert self._manifest is not None
        step = self._manifest.step
        self._end()
        if self._leads:
            try:
                self._files.abort(step, self._token_of_save)
            except CheckpointError as error:
                # The next job removes it; what has failed before is what matters.
                _logger.warning("what is left of step %d cannot be removed now: %s", step, error)

    # Before writing

    def _worth(self, step: int, values: Mapping[str, Any] | None) -> Worth | None:
        """What the step is worth, if that is wanted; for rank 0. It says once why it has none."""
        best = self.keeping.best
        if best is None or self._collectives.rank != 0:
            return None
        worth, why = worth_of(best, values or {})
        if why and values is not None and why not in self._said:
            self._said.add(why)
            _logger.warning(
                "step %d cannot be the best: %s %s. A step that is to be compared is saved in an "
                "iteration in which that is reported, as a finite number (said once)",
                step,
                best[0],
                why,
            )
        return worth

    def _describe(
        self, step: int, groups: Sequence[SavedGroup], notes: Mapping[str, Any]
    ) -> Manifest:
        optimizers = {name: notes_of(optimizer) for name, optimizer in self._optimizers.items()}
        first = next(iter(optimizers.values()))
        scale = {key: value for key, value in first.items() if key.startswith("loss_scale")}
        return Manifest(
            step=step,
            t=first["t"],
            epoch=first["epoch"],
            world_size=self._collectives.size,
            local=bool(self._local),
            created=manifest_json.now(),
            versions=versions(),
            hyperparameters=hyperparameters_of(self._first),
            loss_scale=None if first["loss_scale"] is None else scale,
            notes={**notes, "optimizers": optimizers, "parent": self._lineage.parent},
            groups=groups_of(self._optimizers, groups),
            files=(),
        )

    @property
    def _token_of_save(self) -> str:
        return f"{self._token}x{self._saves}"

    def _look_for_strangers(self, step: int, overwrite: bool) -> None:
        """Looks which steps have to be set aside; for leaders.

        Raises:
            CheckpointError: If some are of another training.
        """
        there = self._files.numbers()
        strange = self._lineage.strange(there, step)
        if strange and not overwrite:
            raise CheckpointError(
                self.directory,
                f"has {_listed(strange)}, which this training has neither saved nor loaded, and "
                "its own would be older or replace them. Load with maybe_load() or "
                "load_checkpoint() first, choose another directory, or set them aside with "
                "overwrite=True",
            )
        self._aside = self._lineage.left_behind(there)
        if overwrite:
            self._aside = sorted({*self._aside, *self._lineage.unrelated(there)})

    def _begin(self, step: int, overwrite: bool) -> Path:
        """Makes the directory of the save on every file system that there is. Collective."""
        assert self._manifest is not None
        self._saves += 1
        if self._local is None:
            self._token = self._collectives.all_gather_object(new_token())[0]
            self._leads = self._collectives.rank == 0
            self._make(step, overwrite)
            self._find_out_about_hosts(step, overwrite)
            self._manifest = dataclasses.replace(self._manifest, local=bool(self._local))
        else:
            self._make(step, overwrite)
        if self._aside and self._collectives.rank == 0:
            _logger.warning(
                "%s: %s, which this training does not go on from, will be set aside: renamed to "
                "abandoned-step-...",
                self.directory,
                _listed(self._aside),
            )
        return self._files.saving(step, self._token_of_save)

    def _make(self, step: int, overwrite: bool) -> None:
        with together(self._collectives, self.directory):
            if self._leads:
                self._files.lock()
                self._look_for_strangers(step, overwrite)
                self._files.begin(step, self._token_of_save)

    def _find_out_about_hosts(self, step: int, overwrite: bool) -> None:
        """Whether all hosts see what rank 0 has made, or each has a file system of its own."""
        everybody = self._look(step)
        hosts = [host for host, _ in everybody]
        if all(sees for _, sees in everybody):
            self._local = False
            return
        if any(sees for host, sees in everybody if host != hosts[0]):
            raise self._not_seen(everybody, "what rank 0 makes there, and others do")
        self._leads = hosts.index(self._host) == self._collectives.rank
        with together(self._collectives, self.directory):
            if self._leads and self._collectives.rank != 0:
                self._files.lock()
                self._look_for_strangers(step, overwrite)
                self._files.begin(step, self._token_of_save)
        everybody = self._look(step)
        if not all(sees for _, sees in everybody):
            raise self._not_seen(everybody, "what the first rank of that host makes there")
        self._local = True

    def _look(self, step: int) -> list[tuple[str, bool]]:
        """The host of each rank, and whether it sees the directory of the save. Collective."""
        seen = self._files.saving(step, self._token_of_save).is_dir()
        return self._collectives.all_gather_object((self._host, seen))

    def _not_seen(self, everybody: list[tuple[str, bool]], what: str) -> CheckpointError:
        blind = [f"{rank} on {host}" for rank, (host, sees) in enumerate(everybody) if not sees]
        return CheckpointError(
            self.directory,
            f"cannot be used together: rank {', '.join(blind)} cannot see {what}. Give a directory "
            "that all hosts share, or one that is each host's own",
        )

    def say_unfinished(self) -> None:
        """Tells, on rank 0, of a save that the program has not waited for."""
        if self._manifest is not None and self._collectives.rank == 0:
            _logger.error(
                "step %d was not committed to %s, because the program has ended before: call wait()"
                " on what save_checkpoint() has returned, on all ranks",
                self._manifest.step,
                self.directory,
            )


def _listed(steps: Sequence[int]) -> str:
    return f"{'step' if len(steps) == 1 else 'steps'} {', '.join(map(str, steps))}"


_unfinished: set[Saver] = set()
"""What still saves; a saver that does not would keep its model until the program ends."""


@atexit.register
def _say_unfinished() -> None:
    for saver in _unfinished:
        saver.say_unfinished()

"""Checkpoints of a Trainer, and of loops without one."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from smorms3_dist.chainer_internals.trainers import entries_of
from smorms3_dist.checkpoint.files.errors import NoCheckpointError
from smorms3_dist.checkpoint.files.manifest import Manifest
from smorms3_dist.checkpoint.files.steps import Steps
from smorms3_dist.checkpoint.keeping import AfterSave, Keeping
from smorms3_dist.checkpoint.loading import Loader
from smorms3_dist.checkpoint.model_state import Optimizers
from smorms3_dist.checkpoint.saving import Saver
from smorms3_dist.checkpoint.unsaved import resume_shifts
from smorms3_dist.optimizer.end_of_training import EndOfTraining
from smorms3_dist.optimizer.of_trainer import sharded_optimizers_of
from smorms3_dist.optimizer.optimizer import ShardedOptimizer
from smorms3_dist.optimizer.rank_zero import as_rank_zero
from smorms3_dist.rank_page import Preempted, page
from smorms3_dist.step.agreement import NO_FLAGS, Flag

import chainer
from chainer.training import Extension, Trainer
from chainer.training.triggers import ManualScheduleTrigger

_logger = logging.getLogger(__name__)

DIRECTORY = "SMORMS3_CHECKPOINT_DIR"
"""The variable that says where checkpoints go, if a script does not."""


class ShardedCheckpoint(Extension):
    """Saves a training so that it can go on at any world size; an extension of Chainer's Trainer.

    Each rank saves what it owns, and its own trainer: iterators, extensions, random states. To be
    extended with on all ranks. Training waits until everything is copied to host memory; files are
    written in the background, and a step exists from the moment when all of them are there. What
    fails in the background is raised by the next update, on all ranks. ``checkpoint/stalled_s`` and
    ``checkpoint/waited_s`` are reported with the next update: the seconds that training has waited
    for the comparison of ranks and the copies, and for the save before.

    Example::

        checkpoint = smorms3_dist.ShardedCheckpoint("checkpoints", keep_last=3, every=(1, "epoch"))
        trainer.extend(checkpoint)
        checkpoint.maybe_load(trainer)
        trainer.run()

    Where `smorms3-dist run` is asked to end (SIGTERM, SIGUSR1), the training saves after the update
    that it is in, whatever ``every`` says, and ends by `smorms3_dist.Preempted`.

    Args:
        directory: Where the steps go: a directory that all hosts share, or one that is each host's
            own. By default what ``smorms3-dist run --checkpoint-dir`` says.
        keep_last: How many of the newest steps to keep; all if ``None``.
        keep_every: Steps that are multiples of it are kept, too.
        keep_best: The best step is kept, too, by a value that is reported in the iteration of the
            save: its name, and whether the largest is best or the smallest, such as
            ``("validation/main/accuracy", "max")``. Rank 0's value counts. Of equal ones the older
            is kept; steps without the value, or whose value is not finite, are not compared.
        every: The trigger, as `chainer.training.Trainer.extend` takes it; ``None`` for none.
        every_minutes: A step is saved besides when so many minutes have passed since the last
            save, or the beginning, by the clock of rank 0.
        after_save: Is called on rank 0 with the number of each step and its directory, a
            `pathlib.Path`, once the step is whole: in the thread that has written it, unless that
            is not ``asynchronous``. It must not communicate with other ranks. The next save waits
            until it has ended; until then nothing removes the step. If it raises an exception, that
            is logged, and the training goes on.
        asynchronous: Whether files are written in the background.
        strict: Whether `maybe_load` wants model and trainer to be as they were when saved.
        overwrite: Whether steps of another training, which this one has not loaded, are set aside.
            Otherwise the training is refused where its own steps would be older, or replace them.
        check_sync: Whether the ranks' parameters are compared before each save, and at the end of
            the training: a model that differs between ranks is not saved. See
            `ShardedOptimizer.check_sync`.

    Raises:
        ValueError: If a number is not positive, ``keep_best`` is something else, or there is no
            directory.
    """

    priority = -100

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: tuple[str, str] | None = None,
        every: Any = (1, "epoch"),
        every_minutes: float | None = None,
        after_save: AfterSave | None = None,
        asynchronous: bool = True,
        strict: bool = True,
        overwrite: bool = False,
        check_sync: bool = True,
    ) -> None:
        self.trigger = ManualScheduleTrigger([], "iteration") if every is None else every
        self._directory = os.environ.get(DIRECTORY, "") if directory is None else directory
        if not os.fspath(self._directory):
            raise ValueError(
                "ShardedCheckpoint needs a directory: give it one, or start the script by "
                "smorms3-dist run --checkpoint-dir"
            )
        self._keeping = Keeping(keep_last, keep_every, keep_best)
        self._after_save = after_save
        self._clock = None if every_minutes is None else _Clock(every_minutes)
        self._asynchronous = asynchronous
        self._strict = strict
        self._overwrite = overwrite
        # Of what was loaded: extensions with a state, those that were there, and hyperparameters.
        self._saved_names: frozenset[str] = frozenset()
        self._loaded_names: frozenset[str] = frozenset()
        self._hyperparameters: dict[str, dict[str, Any]] = {}
        self._saver: Saver | None = None
        self._check_sync = check_sync
        self._end = EndOfTraining()
        self._report = _Report()
        # Asked to end from now on, the training saves at its first update, however long it loads.
        page.handles = 1

    def maybe_load(self, trainer: Trainer, optimizer: Any = None) -> int | None:
        """Goes on from the newest step that is whole, if there is one. Collective.

        To be called before ``trainer.run()``, after all extensions have been added. Rank 0 says on
        stderr what has become of it.

        Args:
            trainer: The trainer.
            optimizer: Not needed; accepted as ChainerMN's checkpointer does.

        Returns:
            The step, or ``None`` if there is none.

        Raises:
            CheckpointError: If there are only damaged steps, or the newest is of another model.
        """
        optimizers = sharded_optimizers_of(trainer)
        loader = Loader(self._directory, optimizers, self._strict)
        manifest = loader.load(None, {"trainer": trainer})
        if next(iter(optimizers.values())).collectives.rank == 0:
            sys.stderr.write(
                f"smorms3_dist: {self._directory} has no checkpoint: starting afresh\n"
                if manifest is None
                else f"smorms3_dist: going on from step {manifest.step} of {self._directory}\n"
            )
        if manifest is None:
            return None
        self._saved_names = loader.extensions
        self._loaded_names = _names_of(trainer)
        self._hyperparameters = {
            name: dict(notes.get("hyperparameters", {}))
            for name, notes in manifest.notes.get("optimizers", {}).items()
        }
        return manifest.step

    def initialize(self, trainer: Trainer) -> None:
        """Takes the directory for this job. Collective."""
        self._end.expect(trainer)
        self._saver_of(trainer).lock(trainer.updater.iteration + 1, self._overwrite)
        resume_shifts(trainer, self._hyperparameters)
        self._warn_of_late_extensions(trainer)
        for entry in entries_of(trainer):
            if entry.extension is self and not isinstance(entry.trigger, _OrWhenAsked):
                entry.trigger = _OrWhenAsked(as_rank_zero(entry.trigger), self._clock)
        if self._clock is not None:
            self._clock.start()
        _is_asked(trainer)

    def __call__(self, trainer: Trainer) -> None:
        """Saves a step. Collective."""
        saver = self._saver_of(trainer)
        asked = _is_asked(trainer)
        saver.save(
            trainer.updater.iteration,
            {"trainer": trainer},
            self._asynchronous and not asked,
            self._overwrite,
            self._values_of(trainer, asked or (self._clock is not None and self._clock.is_due)),
        )
        if asked:
            raise Preempted
        if self._clock is not None:
            self._clock.start()
        self._report.values = {
            "checkpoint/stalled_s": saver.stalled_s,
            "checkpoint/waited_s": saver.waited_s,
        }

    def on_error(self, trainer: Trainer, exc: Exception, tb: Any) -> None:
        """Notes that the ranks will not meet again."""
        self._end.give_up()

    def finalize(self) -> None:
        """Waits for the last save and compares the ranks, if the training has ended well.

        Collective.
        """
        if self._saver is None:
            return
        if not self._end.is_good:
            self._saver.close()
            return
        try:
            self._saver.wait("the wait for its last save, at the end of training")
            if self._check_sync:
                self._end.check_sync()
        finally:
            self._saver.close()

    def _values_of(self, trainer: Trainer, is_early: bool) -> Mapping[str, Any] | None:
        """What has been reported; ``None`` if it lacks a value that nobody could expect there."""
        best = self._keeping.best
        if is_early and best is not None and best[0] not in trainer.observation:
            return None
        return trainer.observation

    def _warn_of_late_extensions(self, trainer: Trainer) -> None:
        late = sorted((_names_of(trainer) - self._loaded_names) & self._saved_names)
        optimizer = next(iter(sharded_optimizers_of(trainer).values()))
        if late and self._hyperparameters and optimizer.collectives.rank == 0:
            _logger.warning(
                "the trainer was extended with %s after maybe_load(): their state in the "
                "checkpoint was not loaded. Extend it before",
                ", ".join(late),
            )

    def _saver_of(self, trainer: Trainer) -> Saver:
        if self._saver is None:
            optimizers = sharded_optimizers_of(trainer)
            self._saver = Saver(self._directory, optimizers)
            self._saver.keeping, self._saver.after_save = self._keeping, self._after_save
            self._saver.check_sync = self._check_sync
            first = next(iter(optimizers.values()))
            first.ask_before_each_step(self._report)
            if self._clock is not None:
                self._clock.is_asked = first.collectives.rank == 0
                first.ask_before_each_step(self._clock)
        return self._saver


def _names_of(trainer: Trainer) -> frozenset[str]:
    return frozenset(entry.extension.name for entry in entries_of(trainer))


def _is_asked(trainer: Trainer) -> bool:
    return any(optimizer.asked_to_end for optimizer in sharded_optimizers_of(trainer).values())


class _OrWhenAsked:
    """A trigger that fires besides when the training is asked to end, or by a clock.

    Args:
        trigger: The trigger that it takes the place of, whose state it saves and loads.
        clock: The clock.
    """

    def __init__(self, trigger: Any, clock: _Clock | None = None) -> None:
        self._trigger = trigger
        self._clock = clock

    def __call__(self, trainer: Trainer) -> bool:
        fires = self._trigger(trainer)
        return _is_asked(trainer) or fires or (self._clock is not None and self._clock.is_due)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._trigger, name)


class _Clock:
    """Says alike on all ranks when it is time to save: rank 0 raises a flag before a step.

    Args:
        minutes: After how many of them it is time.

    Attributes:
        is_asked: Whether this rank's clock counts.
        is_due: Whether it was time before the last step.
    """

    def __init__(self, minutes: float) -> None:
        if not 0 < minutes < math.inf:
            raise ValueError(f"every_minutes must be a positive number or None, not {minutes}")
        self._seconds = minutes * 60
        self._since = time.monotonic()
        self.is_asked = self.is_due = False

    def start(self) -> None:
        """Begins to count."""
        self._since = time.monotonic()
        self.is_due = False

    def flags(self) -> Flag:
        """See `smorms3_dist.step.agreement.Background`."""
        is_time = self.is_asked and time.monotonic() - self._since >= self._seconds
        return Flag.WANTED if is_time else NO_FLAGS

    def proceed(self, flags: Flag) -> None:
        """See `smorms3_dist.step.agreement.Background`."""
        self.is_due = Flag.WANTED in flags


class _Report:
    """Reports values from within the next update.

    What is reported after the readers of observations, with the lowest priority, reaches nobody.
    """

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def flags(self) -> Flag:
        """See `smorms3_dist.step.agreement.Background`."""
        return NO_FLAGS

    def proceed(self, flags: Flag) -> None:
        """See `smorms3_dist.step.agreement.Background`."""
        chainer.reporter.report(self.values)
        self.values = {}


def save_checkpoint(
    directory: str | os.PathLike[str],
    optimizer: ShardedOptimizer | Optimizers,
    *,
    step: int | None = None,
    objects: Mapping[str, Any] | None = None,
    keep_last: int | None = None,
    keep_every: int | None = None,
    keep_best: tuple[str, str] | None = None,
    values: Mapping[str, Any] | None = None,
    after_save: AfterSave | None = None,
    asynchronous: bool = False,
    overwrite: bool = False,
    check_sync: bool = True,
) -> Saver:
    """Saves a step of a training without a Trainer. All ranks call it together.

    Args:
        directory: Where the steps go, as for `ShardedCheckpoint`.
        optimizer: The sharded optimizer; or several, by name.
        step: The number of the step, by default the optimizer's ``t``.
        objects: What each rank keeps besides, by name: iterators, and whatever else has Chainer's
            ``serialize``.
        keep_last: How many of the newest steps to keep; all if ``None``.
        keep_every: Steps that are multiples of it are kept, too.
        keep_best: The best step is kept, too, by one of the ``values``, as for
            `ShardedCheckpoint`.
        values: Numbers by name, such as ``{"accuracy": 0.97}``; rank 0's count.
        after_save: Is called on rank 0 once the step is whole, as for `ShardedCheckpoint`.
        asynchronous: Whether to come back as soon as everything is copied to host memory. The step
            is there when a later update, or ``wait()`` on what is returned, has found all files
            written: call that before the program ends.
        overwrite: Whether steps of another training, which this one has neither saved nor loaded,
            are set aside where the step would be older, or replace one.
        check_sync: Whether the ranks' parameters are compared first, as for `ShardedCheckpoint`.

    Returns:
        What saves. It is used again for the same directory and optimizer, with its memory.

    Raises:
        CheckpointError: If it cannot be saved, on all ranks; or if there are steps of another
            training.
        RuntimeError: If the ranks' parameters differ, on all ranks.
        ValueError: If a number is not positive, or ``keep_best`` is something else.
    """
    keeping = Keeping(keep_last, keep_every, keep_best)
    optimizers = {"main": optimizer} if isinstance(optimizer, ShardedOptimizer) else optimizer
    first = next(iter(optimizers.values()))
    saver = next(
        (
            work
            for work in first.background
            if isinstance(work, Saver) and work.saves(directory, optimizers)
        ),
        None,
    )
    if saver is None:
        saver = Saver(directory, optimizers)
    saver.keeping, saver.after_save, saver.check_sync = keeping, after_save, check_sync
    models = {f"models/{name}": each.target for name, each in optimizers.items()}
    number = first.t if step is None else step
    saver.save(number, {**(objects or {}), **models}, asynchronous, overwrite, values or {})
    return saver


def load_checkpoint(
    directory: str | os.PathLike[str],
    optimizer: ShardedOptimizer | Optimizers,
    *,
    step: int | None = None,
    objects: Mapping[str, Any] | None = None,
    strict: bool = True,
    missing_ok: bool = False,
) -> Manifest | None:
    """Loads a step that `save_checkpoint` has saved, at any world size. All ranks call it together.

    The next update makes a step; nothing is broadcast first. A save that is still being written is
    waited for. Where an older step is loaded than the newest, the training goes back to it: newer
    ones are set aside at the next save.

    Args:
        directory: Where the steps are.
        optimizer: The sharded optimizer, set up; or several, by name.
        step: The step; by default the newest one that is whole.
        objects: As for `save_checkpoint`. At another world size, iterators move to where they were:
            as many passes over their datasets.
        strict: Whether the model must be the one that was saved. Otherwise parameters that differ
            are left as they are, and named in a warning.
        missing_ok: Whether no step at all is no error.

    Returns:
        The manifest of the step; ``None`` if there is none and ``missing_ok``.

    Raises:
        NoCheckpointError: If there is no such step, or none at all; on all ranks.
        DamagedCheckpointError: If it is damaged, or all are.
        CheckpointError: If it is of another model or other objects. Nothing has been changed then,
            but that parameters may have been initialized.
        RuntimeError: Before ``setup``.
    """
    optimizers = {"main": optimizer} if isinstance(optimizer, ShardedOptimizer) else optimizer
    models = {f"models/{name}": each.target for name, each in optimizers.items()}
    loader = Loader(directory, optimizers, strict)
    manifest = loader.load(step, {**(objects or {}), **models})
    if manifest is None and not missing_ok:
        raise NoCheckpointError(
            os.fspath(directory),
            "has no checkpoint. If that may be so, load with missing_ok=True",
        )
    return manifest


def latest_step(directory: str | os.PathLike[str]) -> int | None:
    """The newest step in a directory that is whole by names and sizes. Any process may ask.

    Args:
        directory: Where the steps are.

    Returns:
        The step; ``None`` if there is none.

    Raises:
        CheckpointError: If the directory cannot be read.
    """
    return Steps(directory).latest()

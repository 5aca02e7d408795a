"""Trainer extensions and triggers for a training whose optimizer states are sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smorms3_dist.chainer_internals.trainers import iterators_of
from smorms3_dist.optimizer.early_stopping import EarlyStopping
from smorms3_dist.optimizer.end_of_training import EndOfTraining
from smorms3_dist.optimizer.of_trainer import sharded_optimizers_of
from smorms3_dist.optimizer.snapshots import Snapshot, has_iterators
from smorms3_dist.report.step_report import StepReport as StepReport
from smorms3_dist.report.tensorboard import TensorBoardReport as TensorBoardReport
from smorms3_dist.step.agreement import NO_FLAGS, Flag, meet

from chainer.training import Extension, Trainer
from chainer.training.extensions import snapshot as _chainers_snapshot
from chainer.training.triggers import EarlyStoppingTrigger


def snapshot(
    savefun: Callable[..., Any] | None = None,
    filename: str | Callable[[Trainer], str] = "snapshot_iter_{.updater.iteration}",
    *,
    target: Any = None,
    condition: Callable[[], bool] | None = None,
    writer: Any = None,
    snapshot_on_error: bool = False,
    n_retains: int = -1,
    autoload: bool = False,
    check_sync: bool = True,
) -> Snapshot:
    """Makes what `chainer.training.extensions.snapshot` makes, for sharded optimizers.

    It is to be extended with on all ranks. At each snapshot the ranks bring the states of all
    sharded optimizers of the trainer's updater together on rank 0, which writes one file: in
    Chainer's own keys, to be loaded at any world size, and by Chainer itself. Where a trigger looks
    at the time or at a value, rank 0's counts for all ranks.

    Args:
        savefun: Function to save with, given a path and an object; ``save_npz`` by default.
        filename: Name of the file, formatted with the trainer, or a function of the trainer.
        target: What is saved, the trainer by default.
        condition: Called on rank 0, without arguments; no snapshot is made where it returns false.
        writer: One of Chainer's snapshot writers, in place of ``savefun``. It is given copies:
            training goes on while it writes.
        snapshot_on_error: Must be false: the ranks that have not failed could not help.
        n_retains: How many of the newest files to keep; all if it is not positive.
        autoload: Whether all ranks load the newest file of that name in the output directory of
            rank 0's trainer, if there is one, before training starts.
        check_sync: Whether the ranks' parameters are compared at the end of the training; see
            `ShardedOptimizer.check_sync`.

    Returns:
        The extension.

    Raises:
        TypeError: If both ``savefun`` and ``writer`` are given.
        ValueError: If ``snapshot_on_error`` is asked for.
    """
    if snapshot_on_error:
        raise ValueError(
            "snapshot_on_error=True is not supported: the states lie on all ranks, and a rank that "
            "fails cannot collect them. Use smorms3_dist.ShardedCheckpoint, often"
        )
    inner = _chainers_snapshot(savefun, filename, target=target, writer=writer, n_retains=n_retains)
    return Snapshot(inner, condition, autoload, has_iterators(target), check_sync)


def early_stopping_trigger(
    check_trigger: Any = (1, "epoch"),
    monitor: str = "main/loss",
    patience: int | None = None,
    mode: str = "auto",
    verbose: bool = False,
    max_trigger: Any = (100, "epoch"),
    **kwargs: Any,
) -> EarlyStopping:
    """Makes what `chainer.training.triggers.EarlyStoppingTrigger` is, for sharded optimizers.

    It is to be the trainer's ``stop_trigger`` on all ranks. Rank 0's value counts for all, so that
    they end together; other ranks need not have any. Unlike Chainer's, it is saved and loaded: a
    resumed training has the patience that was left.

    Args:
        check_trigger: When the value is looked at.
        monitor: The key of the value.
        patience: How many looks without a better value end the training; 3 by default.
        mode: ``'max'``, ``'min'``, or ``'auto'`` to go by the key.
        verbose: Whether rank 0 says when it stops early.
        max_trigger: When the training ends in any case.
        **kwargs: Chainer's other names for arguments.

    Returns:
        The trigger.
    """
    return EarlyStopping(
        EarlyStoppingTrigger(check_trigger, monitor, patience, mode, verbose, max_trigger, **kwargs)
    )


def stop_together() -> StopTogether:
    """Makes an extension with which training ends on all ranks as soon as it ends on one.

    It is to be extended with on all ranks. Before each iteration the ranks ask each other whether
    the stop trigger of one fires, or one of its iterators, without ``repeat``, has no more batches:
    early stopping on a rank's own loss, and data of different lengths, end the training on all
    ranks after the same number of updates.

    Returns:
        The extension.
    """
    return StopTogether()


class StopTogether(Extension):
    """See `stop_together`."""

    def initialize(self, trainer: Trainer) -> None:
        """Takes the place of the stop trigger."""
        if not isinstance(trainer.stop_trigger, _WhenAnyStops):
            trainer.stop_trigger = _WhenAnyStops(trainer.stop_trigger)

    def __call__(self, trainer: Trainer) -> None:
        """Does nothing."""


class _WhenAnyStops:
    """A stop trigger that fires on all ranks when it fires on one. Collective.

    Args:
        trigger: The one of this rank, whose state it saves and loads.
    """

    def __init__(self, trigger: Any) -> None:
        self._trigger = trigger

    def __call__(self, trainer: Trainer) -> bool:
        iterators = iterators_of(trainer.updater).values()
        stops = self._trigger(trainer) or any(
            it.epoch > 0 and not getattr(it, "repeat", True) for it in iterators
        )
        collectives = next(iter(sharded_optimizers_of(trainer).values())).collectives
        occasion = f"the end of iteration {trainer.updater.iteration}"
        return Flag.ENDS in meet(collectives, occasion, Flag.ENDS if stops else NO_FLAGS)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._trigger, name)


def check_sync(
    every: Any = (1, "epoch"), *, persistent: bool = False, repair: bool = False
) -> CheckSync:
    """Makes an extension that compares across ranks what they have: see `ShardedOptimizer`.

    It is to be extended with on all ranks. It compares at each trigger, after all other extensions,
    and at the end of the training.

    Args:
        every: A number of iterations; or a trigger, as `chainer.training.Trainer.extend` takes it.
        persistent: Whether to compare persistent values of links as well.
        repair: Whether to give all ranks what rank 0 has of what differs, instead of an error.

    Returns:
        The extension.

    Raises:
        ValueError: If the number is not positive.
    """
    if isinstance(every, int):
        if every < 1:
            raise ValueError(f"every must be a positive number of iterations, not {every}")
        every = every, "iteration"
    return CheckSync(every, persistent, repair)


class CheckSync(Extension):
    """See `check_sync`."""

    # After all that may write to parameters. An update gathers them from their owners, and hides
    # what was written to them before.
    priority = -200

    def __init__(self, every: Any, persistent: bool, repair: bool) -> None:
        self.trigger = every
        self._persistent, self._repair = persistent, repair
        self._end = EndOfTraining()

    def initialize(self, trainer: Trainer) -> None:
        """Compares the ranks, if there has been an update. Collective."""
        self._end.expect(trainer)
        for optimizer in sharded_optimizers_of(trainer).values():
            if optimizer.layout is not None:
                optimizer.check_sync(self._persistent, self._repair)

    def __call__(self, trainer: Trainer) -> None:
        """Compares the ranks. Collective."""
        for optimizer in sharded_optimizers_of(trainer).values():
            optimizer.check_sync(self._persistent, self._repair)

    def on_error(self, trainer: Trainer, exc: Exception, tb: Any) -> None:
        """Notes that the ranks will not meet again."""
        self._end.give_up()

    def finalize(self) -> None:
        """Compares the ranks, if the training has ended well. Collective."""
        self._end.check_sync(self._persistent, self._repair)

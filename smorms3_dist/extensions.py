"""Trainer extensions and triggers for a training whose optimizer states are sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smorms3_dist.optimizer.early_stopping import EarlyStopping
from smorms3_dist.optimizer.snapshots import Snapshot, has_iterators

from chainer.training import Trainer, extensions
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
    inner = extensions.snapshot(
        savefun, filename, target=target, writer=writer, n_retains=n_retains
    )
    return Snapshot(inner, condition, autoload, has_iterators(target))


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

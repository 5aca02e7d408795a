"""What all ranks do together before a trainer with a sharded optimizer runs."""

from __future__ import annotations

from collections.abc import Mapping

from smorms3_dist.chainer_internals.trainers import entries_of, reads_gradients
from smorms3_dist.optimizer.accumulation import make_iterations_of
from smorms3_dist.optimizer.joining_snapshots import join_snapshots
from smorms3_dist.optimizer.of_trainer import sharded_optimizers_of
from smorms3_dist.optimizer.optimizer import ShardedOptimizer

from chainer.training import Trainer


def prepare(trainer: Trainer) -> None:
    """Prepares a trainer's sharded optimizers, if it has any, for its extensions. Collective.

    Raises:
        RuntimeError: If an extension cannot work.
    """
    try:
        optimizers = sharded_optimizers_of(trainer)
    except (TypeError, AttributeError, NotImplementedError):
        # None is sharded, or the updater keeps its optimizers to itself.
        return
    for optimizer in optimizers.values():
        _look_for_readers(trainer, optimizer)
    _accumulate(trainer, optimizers)
    join_snapshots(trainer, next(iter(optimizers.values())).collectives)


def _accumulate(trainer: Trainer, optimizers: Mapping[str, ShardedOptimizer]) -> None:
    counts = {name: optimizer.micro_batches for name, optimizer in optimizers.items()}
    others = trainer.updater.get_all_optimizers().keys() - optimizers.keys()
    counts.update({name: 1 for name in others})
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{count} for {name!r}" for name, count in sorted(counts.items()))
        raise RuntimeError(
            f"the optimizers of one updater take different numbers of micro-batches: {told}. Give "
            "all of them the same accumulate"
        )
    (count,) = set(counts.values())
    if count > 1:
        make_iterations_of(trainer.updater, count)


def _look_for_readers(trainer: Trainer, optimizer: ShardedOptimizer) -> None:
    names = [e.extension.name for e in entries_of(trainer) if reads_gradients(e.extension)]
    optimizer.gradients_read_by = names[0] if names else None
    if names and optimizer.gradients == "sharded" and not optimizer.keep_gradients:
        raise RuntimeError(
            f"the extension {names[0]} reads gradients after each step, and with "
            "gradients='sharded' no rank has them whole. Use gradients='auto', report_grads=False,"
            " or keep_gradients = True and gather_gradients() before it"
        )

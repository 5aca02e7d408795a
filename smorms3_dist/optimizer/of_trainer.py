"""The sharded optimizers of a trainer."""

from __future__ import annotations

from smorms3_dist.optimizer.optimizer import ShardedOptimizer

from chainer.training import Trainer


def sharded_optimizers_of(trainer: Trainer) -> dict[str, ShardedOptimizer]:
    """The sharded optimizers of a trainer's updater by name, in an order alike on all ranks.

    Raises:
        TypeError: If there is none.
    """
    found = {
        name: optimizer
        for name, optimizer in sorted(trainer.updater.get_all_optimizers().items())
        if isinstance(optimizer, ShardedOptimizer)
    }
    if not found:
        raise TypeError(
            "the trainer's updater has no sharded optimizer: make one by "
            "smorms3_dist.create_multi_node_optimizer, or use Chainer's own snapshot extension"
        )
    return found

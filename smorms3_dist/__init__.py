"""Distributed training for Chainer: a multi-node optimizer that shards its states over the ranks.

Import it before Chainer: it makes Chainer 7.8.1 run on today's Python and NumPy
(`smorms3_dist.compat`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from smorms3_dist import compat

compat.apply()

if TYPE_CHECKING:
    from smorms3_dist.factory import create_multi_node_optimizer, shard
    from smorms3_dist.gpu import use_gpu
    from smorms3_dist.optimizer import ShardedOptimizer

__version__ = "0.1.0"

__all__ = ["ShardedOptimizer", "compat", "create_multi_node_optimizer", "shard", "use_gpu"]


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: `import smorms3_dist` must not import Chainer, which the user may
    # want to configure.
    if name in ("create_multi_node_optimizer", "shard"):
        from smorms3_dist import factory

        return getattr(factory, name)
    if name == "use_gpu":
        from smorms3_dist.gpu import use_gpu

        return use_gpu
    if name == "ShardedOptimizer":
        from smorms3_dist.optimizer import ShardedOptimizer

        return ShardedOptimizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

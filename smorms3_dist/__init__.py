"""Distributed training for Chainer: a multi-node optimizer that shards its states over the ranks.

Import it before Chainer: it makes Chainer 7.8.1 run on today's Python and NumPy
(`smorms3_dist.compat`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from smorms3_dist import compat
from smorms3_dist.version import __version__ as __version__

compat.apply()

if TYPE_CHECKING:
    from smorms3_dist import extensions
    from smorms3_dist.checkpoint.extension import (
        ShardedCheckpoint,
        latest_step,
        load_checkpoint,
        save_checkpoint,
    )
    from smorms3_dist.checkpoint.files.errors import (
        CheckpointError,
        DamagedCheckpointError,
        NoCheckpointError,
    )
    from smorms3_dist.collectives.gpus import use_gpu
    from smorms3_dist.optimizer.factory import create_multi_node_optimizer, shard
    from smorms3_dist.optimizer.optimizer import ShardedOptimizer
    from smorms3_dist.rank_page import Preempted
    from smorms3_dist.report.meter import StepMeter
    from smorms3_dist.step.agreement import NoMoreBatches

__all__ = [
    "CheckpointError",
    "DamagedCheckpointError",
    "NoCheckpointError",
    "NoMoreBatches",
    "Preempted",
    "ShardedCheckpoint",
    "ShardedOptimizer",
    "StepMeter",
    "compat",
    "create_multi_node_optimizer",
    "extensions",
    "latest_step",
    "load_checkpoint",
    "save_checkpoint",
    "shard",
    "use_gpu",
]

_ROOMS = {
    "CheckpointError": "checkpoint.files.errors",
    "DamagedCheckpointError": "checkpoint.files.errors",
    "NoCheckpointError": "checkpoint.files.errors",
    "ShardedCheckpoint": "checkpoint.extension",
    "latest_step": "checkpoint.extension",
    "load_checkpoint": "checkpoint.extension",
    "save_checkpoint": "checkpoint.extension",
    "create_multi_node_optimizer": "optimizer.factory",
    "shard": "optimizer.factory",
    "use_gpu": "collectives.gpus",
    "NoMoreBatches": "step.agreement",
    "Preempted": "rank_page",
    "ShardedOptimizer": "optimizer.optimizer",
    "StepMeter": "report.meter",
}


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: `import smorms3_dist` must not import Chainer, which the user may
    # want to configure.
    if name in _ROOMS:
        return getattr(importlib.import_module(f"smorms3_dist.{_ROOMS[name]}"), name)
    if name == "extensions":
        return importlib.import_module("smorms3_dist.extensions")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

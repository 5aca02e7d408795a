"""Trainings with double buffering, on ranks that are threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smorms3_dist import create_multi_node_optimizer

import chainer
import models
from chainer import optimizer_hooks, optimizers
from rank_threads import ThreadCollectives, run_ranks

CALLS = range(7)


def train(
    world_size: int,
    make: Callable[[], Any] = optimizers.SMORMS3,
    configure: Callable[[Any], None] = lambda optimizer: None,
    in_threads: bool = True,
    make_model: Callable[[], chainer.Link] = models.Model,
    body: Callable[[Any, int], Any] = lambda optimizer, rank: models.train(optimizer, rank, CALLS),
    **options: Any,
) -> list[Any]:
    """The optimizers of ranks that are threads, after a training."""

    def run(collectives: ThreadCollectives) -> Any:
        collectives.has_side_channel = in_threads
        optimizer = create_multi_node_optimizer(make(), collectives, True, **options)
        optimizer.setup(make_model())
        configure(optimizer)
        body(optimizer, collectives.rank)
        return optimizer

    return run_ranks(world_size, run)


def decay(optimizer: Any) -> None:
    optimizer.add_hook(optimizer_hooks.WeightDecay(0.01))


def clip(optimizer: Any) -> None:
    decay(optimizer)
    optimizer.add_hook(optimizer_hooks.GradientClipping(2.0))

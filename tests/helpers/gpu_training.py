"""Trainings on GPUs for the tests beside this: gradients made on the host, models on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from smorms3_dist import create_multi_node_optimizer

import chainer
import models
import numpy as np

STEPS = range(1, 6)


def move(link: chainer.Link, device: str) -> chainer.Link:
    """A link on another device."""
    link.to_device(device)
    link.cleargrads()
    return link


def train_sharded(
    link: chainer.Link,
    communicator: Any,
    make: Callable[[], Any],
    configure: Callable[[Any], None] = lambda optimizer: None,
    steps: Iterable[int] = STEPS,
    **options: Any,
) -> Any:
    """Trains by the sharded optimizer on the gradients of this rank; returns the optimizer."""
    optimizer = create_multi_node_optimizer(make(), communicator, **options).setup(link)
    configure(optimizer)
    optimizer.update()
    for step in steps:
        models.set_gradients(link, optimizer.collectives.rank, step)
        optimizer.update()
    return optimizer


def train_by_losses(
    link: chainer.Link,
    communicator: Any,
    make: Callable[[], Any],
    steps: Iterable[int] = STEPS,
    **options: Any,
) -> Any:
    """As `train_sharded`, with a loss that has these gradients."""
    optimizer = create_multi_node_optimizer(make(), communicator, **options).setup(link)
    rank = optimizer.collectives.rank
    for step in (0, *steps):
        optimizer.update(models.loss_with_gradients, link, rank, step)
    return optimizer


def relative(ours: chainer.Link, theirs: chainer.Link) -> float:
    """The distance of all parameters, as the part of their norm."""

    def flat(link: chainer.Link) -> np.ndarray:
        return np.concatenate([np.ravel(a).astype("d") for a in models.arrays(link).values()])

    return float(np.linalg.norm(flat(ours) - flat(theirs)) / np.linalg.norm(flat(theirs)))

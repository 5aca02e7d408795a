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


def set_gradients(link: chainer.Link, grads: dict[str, np.ndarray]) -> None:
    """Gives parameters, wherever they are, gradients that are on the host."""
    for name, param in link.namedparams(include_uninit=False):
        param.grad = param.device.send(np.asarray(grads[name]))


def of_rank(link: chainer.Link, rank: int, step: int) -> dict[str, np.ndarray]:
    """The gradients of one rank."""
    return {name: models.gradient(name, param, rank, step) for name, param in link.namedparams()}


def mean(link: chainer.Link, world_size: int, step: int) -> dict[str, np.ndarray]:
    """The mean gradients of all ranks."""
    ranks = [of_rank(link, rank, step) for rank in range(world_size)]
    return {name: models.mean_gradient([grads[name] for grads in ranks]) for name in ranks[0]}


def train_plain(
    link: chainer.Link,
    world_size: int,
    make: Callable[[], Any],
    configure: Callable[[Any], None] = lambda optimizer: None,
    steps: Iterable[int] = STEPS,
) -> chainer.Link:
    """Trains by Chainer's own optimizer on the mean gradients."""
    optimizer = make().setup(link)
    configure(optimizer)
    for step in steps:
        set_gradients(link, mean(link, world_size, step))
        with np.errstate(all="ignore"):
            optimizer.update()
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
        set_gradients(link, of_rank(link, optimizer.collectives.rank, step))
        optimizer.update()
    return optimizer


def on_host(link: chainer.Link) -> chainer.Link:
    """The link, on the host, to be compared."""
    link.to_device("@numpy")
    return link


def relative(ours: chainer.Link, theirs: chainer.Link) -> float:
    """The distance of all parameters, as the part of their norm."""

    def flat(link: chainer.Link) -> np.ndarray:
        return np.concatenate([np.ravel(a).astype("d") for a in models.arrays(link).values()])

    return float(np.linalg.norm(flat(ours) - flat(theirs)) / np.linalg.norm(flat(theirs)))

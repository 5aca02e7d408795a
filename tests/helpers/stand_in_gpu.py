"""Trainings on the way of GPUs, with arrays of the stand-in for CuPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smorms3_dist.collectives.nccl import NcclCollectives
from smorms3_dist.collectives.through_host import ThroughHostCollectives

import chainer
import fake_cupy
import models
import numpy as np
from chainer import optimizer_hooks

set_on_host = models.set_gradients

STEPS = range(1, 6)
FLOATS = "float, float, float", "double, double, double"
MODES = ["sharded", "replicated"]
TRANSPORTS = {"nccl": NcclCollectives, "staged": ThroughHostCollectives}


def set_gradients_on_gpu(link: chainer.Link, rank: int, step: int) -> None:
    for name, param in link.namedparams(include_uninit=False):
        grad = models.gradient(name, param, rank, step)
        param.grad = np.asarray(grad).view(fake_cupy.DeviceArray)


def on_gpu(make_model: Callable[[], chainer.Link]) -> Callable[[], chainer.Link]:
    """Makes models whose arrays are of the stand-in for CuPy from the beginning."""

    def make() -> chainer.Link:
        link = make_model()
        for param in link.params():
            param.array = np.asarray(param.array).view(fake_cupy.DeviceArray)
        link.cleargrads()
        return link

    return make


def assert_equals_chainer(
    gpu: Any,
    world_size: int,
    gradients: str,
    configure: Callable[[Any], None] = lambda optimizer: None,
    make: Any = chainer.optimizers.SMORMS3,
    make_model: Callable[[], chainer.Link] = models.Model,
) -> list[Any]:
    theirs = make_model()
    models.train_with_chainer(theirs, world_size, STEPS, configure, make=make)
    ours = models.train_sharded(
        world_size, on_gpu(make_model), STEPS, configure, gradients, make=make
    )
    for optimizer in ours:
        assert optimizer.gradient_mode == gradients
        assert type(optimizer.collectives) is gpu.transport
        assert not optimizer.layout.groups[0].dense
        for param in optimizer.target.params():
            assert isinstance(param.array, fake_cupy.DeviceArray)
    models.assert_same_training(ours, theirs)
    return ours


def decay(optimizer: Any) -> None:
    optimizer.add_hook(optimizer_hooks.WeightDecay(0.01))


def hooked(optimizer: Any) -> None:
    optimizer.add_hook(optimizer_hooks.WeightDecay(0.1))
    optimizer.add_hook(optimizer_hooks.GradientClipping(0.5))
    optimizer.add_hook(optimizer_hooks.GradientLARS())
    optimizer.target.g.update_rule.add_hook(optimizer_hooks.Lasso(0.01))

"""Trainings in which gradients are sent in a narrow dtype, beside Chainer's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from smorms3_dist.kernels.segments import MASTER

import chainer
import collective_checks
import models
import numpy as np
from chainer import optimizer_hooks, optimizers

MODES = ["sharded", "replicated"]
NARROW = ["bfloat16", "float16"]
STEPS = range(1, 6)
SCALE = 1024.0

Configure = Callable[[Any], None]


def rounded(values: np.ndarray, dtype: str | None) -> np.ndarray:
    """Values as other ranks see them."""
    if dtype is None or values.dtype == np.float16:
        return values
    return collective_checks.as_sent(values.ravel(), dtype).reshape(values.shape)


def nothing(optimizer: Any) -> None:
    pass


def all_hooks(optimizer: Any) -> None:
    optimizer.add_hook(optimizer_hooks.WeightDecay(0.01))
    optimizer.add_hook(optimizer_hooks.Lasso(0.001))
    optimizer.add_hook(optimizer_hooks.GradientHardClipping(-0.5, 0.5))


def clipping(optimizer: Any) -> None:
    optimizer.add_hook(optimizer_hooks.GradientClipping(1.0))
    optimizer.add_hook(optimizer_hooks.WeightDecay(0.01))


def lars(optimizer: Any) -> None:
    optimizer.add_hook(optimizer_hooks.GradientLARS(weight_decay=0.01))


def decay_of_a_rule(optimizer: Any) -> None:
    optimizer.target.g.update_rule.add_hook(optimizer_hooks.WeightDecay(0.01))


def static_scale(optimizer: Any) -> None:
    optimizer.set_loss_scale(SCALE)


def set_gradients(model: chainer.Link, rank: int, step: int, scale: float | None) -> None:
    models.set_gradients(model, rank, step)
    for param in model.params() if scale else ():
        param.grad = np.asarray(param.grad * param.dtype.type(scale))
        param._loss_scale = scale


def by_chainer(
    world_size: int,
    dtype: str | None,
    make: Callable[[], Any],
    configure: Configure,
    make_model: Callable[[], chainer.Link] = models.Model,
    steps: Iterable[int] = STEPS,
    scale: float | None = None,
) -> Any:
    """Trains by Chainer's own optimizer on the means of rounded gradients."""
    optimizer = make().setup(make_model())
    configure(optimizer)
    for step in steps:
        grads: dict[str, list[np.ndarray]] = {}
        for rank in range(world_size):
            set_gradients(optimizer.target, rank, step, scale)
            for name, param in optimizer.target.namedparams():
                grads.setdefault(name, []).append(rounded(param.grad, dtype))
        for name, param in optimizer.target.namedparams():
            param.grad = models.mean_gradient(grads[name])
        with np.errstate(all="ignore"):
            optimizer.update()
    return optimizer


def trained(
    world_size: int,
    make: Callable[[], Any] = optimizers.SMORMS3,
    configure: Configure = nothing,
    make_model: Callable[[], chainer.Link] = models.Model,
    scale: float | None = None,
    **options: Any,
) -> list[Any]:
    """Trains by sharded optimizers; returns those of all ranks, whose models are alike."""

    def body(optimizer: Any, rank: int) -> Any:
        configure(optimizer)
        optimizer.update()
        for step in STEPS:
            set_gradients(optimizer.target, rank, step, scale)
            with np.errstate(all="ignore"):
                optimizer.update()
        optimizer.check_sync()
        return optimizer

    return models.on_ranks(world_size, body, make, make_model, **options)


def masters_of(trained: list[Any]) -> dict[str, np.ndarray]:
    states = models.gathered_states(trained).items()
    return {name: arrays[MASTER] for name, arrays in states if MASTER in arrays}

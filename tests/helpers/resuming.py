"""Trainings on ranks that are threads, to be saved and gone on with, without a Trainer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smorms3_dist import create_multi_node_optimizer, load_checkpoint, save_checkpoint

import chainer
import models
import numpy as np
import pytest
from chainer import optimizer_hooks
from chainer.optimizers import MSVAG, SMORMS3, Adam
from rank_threads import ThreadCollectives, run_ranks

WORLD_SIZES = [1, 2, 3, 4, 5]
FIRST, LAST, NO_STEPS = range(1, 4), range(4, 8), range(0)
HALF = {"a": "float16", "b": "float16", "g": "float16"}

half_model = functools.partial(models.Model, dtypes=HALF)


def nothing(optimizer: Any) -> None:
    pass


def masters(optimizer: Any) -> None:
    optimizer.use_fp32_update()


def dynamic(optimizer: Any) -> None:
    optimizer.use_fp32_update()
    optimizer.loss_scaling(interval=2)


def hooked(optimizer: Any) -> None:
    optimizer.add_hook(optimizer_hooks.WeightDecay(0.01))


def make(
    collectives: Any,
    configure: Callable[[Any], None] = nothing,
    make_model: Callable[[], chainer.Link] = models.Model,
    kind: Any = SMORMS3,
    seed: int | None = None,
) -> Any:
    model = make_model()
    if seed is not None:
        for param in model.params():
            if param.array is not None:
                param.array[...] = seed
    optimizer = create_multi_node_optimizer(kind(), collectives).setup(model)
    configure(optimizer)
    return optimizer


def train(optimizer: Any, steps: range, rank: int = 0) -> None:
    for step in steps:
        scale = optimizer._loss_scale
        models.set_gradients(optimizer.target, rank, step)
        for param in optimizer.target.params():
            param._loss_scale = scale
            if scale is not None:
                param.grad *= param.dtype.type(scale)
        with np.errstate(all="ignore"):
            optimizer.update()


def facts(optimizer: Any) -> tuple[Any, ...]:
    rules = {name: param.update_rule.t for name, param in optimizer.target.namedparams()}
    return optimizer.t, optimizer.epoch, rules, optimizer._loss_scale


def assert_same_states(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name, states in theirs.items():
        assert ours[name].keys() == states.keys()
        for state, values in states.items():
            assert models.bits(ours[name][state]) == models.bits(values), (name, state)


SETTINGS = [
    pytest.param(nothing, models.Model, SMORMS3, id="plain"),
    pytest.param(dynamic, half_model, SMORMS3, id="dynamic"),
    pytest.param(hooked, models.Model, SMORMS3, id="hook"),
    pytest.param(masters, half_model, Adam, id="adam"),
    pytest.param(nothing, models.Model, MSVAG, id="msvag"),
]


def save(directory: Path, world_size: int, then: range = NO_STEPS, **options: Any) -> list[Any]:
    """Trains a model, saves it, and trains on; gradients are alike on all ranks.

    Two ranks, or four, then do exactly what one does.
    """

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, **options)
        optimizer.target.cleargrads()
        optimizer.update()
        train(optimizer, FIRST)
        optimizer.new_epoch()
        save_checkpoint(directory, optimizer)
        train(optimizer, then)
        return optimizer

    return run_ranks(world_size, run)


def load(directory: Path, world_size: int, then: range = NO_STEPS, **options: Any) -> list[Any]:
    """Loads the newest step into a model of other values, and trains on."""

    def run(collectives: ThreadCollectives) -> Any:
        optimizer = make(collectives, seed=9, **options)
        load_checkpoint(directory, optimizer)
        train(optimizer, then)
        return optimizer

    return run_ranks(world_size, run)


def assert_same_training(ours: list[Any], theirs: list[Any]) -> None:
    """All ranks have the same parameters, counts and scales, and together the same states."""
    for optimizer in ours:
        assert facts(optimizer) == facts(theirs[0])
        models.assert_same_bits(optimizer.target, theirs[0].target)
    assert_same_states(models.gathered_states(ours), models.gathered_states(theirs))

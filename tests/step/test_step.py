"""The sharded step between threads: bit for bit Chainer's own SMORMS3 on the mean gradients."""

from __future__ import annotations

import functools
from typing import Any

import chainer
import chainer.functions as F
import models
import numpy as np
import pytest

MODES = ["sharded", "replicated"]
STEPS = range(1, 6)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 5])
def test_large_and_0_dimensional_parameters_are_updated_as_by_chainer(
    world_size: int, gradients: str
) -> None:
    theirs = models.Model()
    assert any(param.size > 30_000 for param in theirs.params())
    models.train_with_chainer(theirs, world_size, STEPS, lr=0.01)
    optimizers = models.train_sharded(world_size, models.Model, STEPS, gradients=gradients, lr=0.01)
    models.assert_same_training(optimizers, theirs)


def train_with(world_size: int, gradients: str, prepare: Any) -> list[chainer.Link]:
    """Trains with gradients that ``prepare(model, rank)`` sets; returns the models, by rank."""

    def body(optimizer: Any, rank: int) -> chainer.Link:
        optimizer.update()
        for step in range(3):
            models.set_gradients(optimizer.target, rank, step)
            prepare(optimizer.target, rank)
            optimizer.update()
        return optimizer.target

    return models.on_ranks(world_size, body, gradients=gradients)


@pytest.mark.parametrize("gradients", MODES)
def test_gradients_that_are_not_contiguous_count_as_their_values(gradients: str) -> None:
    def transposed(model: Any, rank: int) -> None:
        for param in model.params():
            if param.ndim == 2:
                param.grad = param.grad.T.copy().T
                assert param.size < 2 or not param.grad.flags.c_contiguous

    theirs = models.Model()
    models.train_with_chainer(theirs, 3, range(3))
    for model in train_with(3, gradients, transposed):
        models.assert_same_bits(model, theirs)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("unused_on", [[0], [1], [0, 1, 2]])
def test_a_gradient_of_none_counts_as_zeros(gradients: str, unused_on: list[int]) -> None:
    names = ["a", "g"]

    def unused(model: Any, rank: int) -> None:
        for name in names if rank in unused_on else []:
            getattr(model, name).cleargrad()

    def zeroed(model: Any, rank: int) -> None:
        for name in names if rank in unused_on else []:
            getattr(model, name).grad[...] = 0

    given = train_with(3, gradients, lambda model, rank: None)[0]
    for ours, theirs in zip(
        train_with(3, gradients, unused), train_with(3, gradients, zeroed), strict=True
    ):
        models.assert_same_bits(ours, theirs)
        assert not np.array_equal(ours.g.array, given.g.array)


@pytest.mark.parametrize("gradients", MODES)
def test_after_a_step_every_rank_has_the_whole_mean_gradient_or_none(gradients: str) -> None:
    for optimizer in models.train_sharded(3, models.Model, STEPS, gradients=gradients):
        for name, param in optimizer.target.namedparams():
            grads = [models.gradient(name, param, rank, STEPS[-1]) for rank in range(3)]
            if gradients == "sharded":
                assert param.grad is None
            else:
                np.testing.assert_array_equal(param.grad, models.mean_gradient(grads))


@pytest.mark.filterwarnings("ignore:.*zerograds? is deprecated")
def test_zerograds_between_replicated_steps() -> None:
    """Backward then adds to the very arrays that hold the last step's mean."""
    theirs = models.Model()
    models.train_with_chainer(theirs, 3, range(3))

    def body(optimizer: Any, rank: int) -> None:
        optimizer.update()
        for step in range(3):
            optimizer.target.zerograds()
            for name, param in optimizer.target.namedparams():
                param.grad += models.gradient(name, param, rank, step)
            optimizer.update()
        # Zero plus a value is the value, but for the sign of zero.
        for name, array in models.arrays(optimizer.target).items():
            np.testing.assert_array_equal(array, models.arrays(theirs)[name])

    models.on_ranks(3, body, gradients="replicated")


@pytest.mark.parametrize("gradients", MODES)
def test_the_gradient_of_a_tied_parameter_is_divided_by_the_loss_scale_once(gradients: str) -> None:
    """Unlike by Chainer, which divides once for each path."""

    def scaled(optimizer: Any) -> None:
        optimizer.set_loss_scale(4.0)
        for param in optimizer.target.params():
            param._loss_scale = 4.0

    theirs = models.Tied()
    models.train_with_chainer(theirs, 2, STEPS, make=chainer.optimizers.SGD, lr=0.1)
    for optimizer in models.train_sharded(
        2, models.Tied, STEPS, scaled, gradients, make=chainer.optimizers.SGD, lr=0.4
    ):
        models.assert_same_bits(optimizer.target, theirs)


@pytest.mark.parametrize("gradients", MODES)
def test_the_loss_scale_counts_for_what_only_some_ranks_have_used(gradients: str) -> None:
    """Weight decay takes it from the parameter, in which the others have noted nothing."""

    def loss(model: Any, used: float) -> chainer.Variable:
        return F.sum(model.a**2) + F.sum(model.g * np.float32(3)) * np.float32(used)

    def prepare(optimizer: Any) -> None:
        optimizer.set_loss_scale(8)
        optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.1))

    theirs = models.Model()
    plain = chainer.optimizers.SGD(lr=0.1).setup(theirs)
    prepare(plain)
    for _ in range(3):
        plain.update(loss, theirs, 0.5)

    def body(optimizer: Any, rank: int) -> None:
        prepare(optimizer)
        for _ in range(3):
            if rank == 0:
                optimizer.update(loss, optimizer.target, 1.0)
            else:
                optimizer.update(lambda: F.sum(optimizer.target.a**2))
        models.assert_same_bits(optimizer.target, theirs)

    make = functools.partial(chainer.optimizers.SGD, lr=0.1)
    models.on_ranks(2, body, make, gradients=gradients, step_after_broadcast=True)


def halve(optimizer: Any) -> None:
    """A hook that gives each parameter another array."""
    for param in optimizer.target.params():
        param.array = np.asarray(param.array * np.float32(0.5))


@pytest.mark.parametrize("world_size", [1, 5])
def test_arrays_and_rules_that_parameters_get_between_steps_are_those_of_the_next(
    world_size: int,
) -> None:
    def before_step(optimizer: Any, step: int) -> None:
        model = optimizer.target
        if step == 2:
            optimizer.add_hook(halve, "halve", timing="post")
        elif step == 3:
            optimizer.remove_hook("halve")
        elif step == 5:
            model.a.array = model.a.array.copy()
            model.e.array = np.ones_like(model.e.array)
        elif step == 6:
            model.c.update_rule = optimizer.create_update_rule()
        elif step == 7:
            model.e.update_rule.t += 10

    theirs = models.Model()
    steps = range(1, 9)
    models.train_with_chainer(theirs, world_size, steps, before_step=before_step, lr=0.01)
    ours = models.train_sharded(world_size, models.Model, steps, before_step=before_step, lr=0.01)
    assert ours[0].gradient_mode == "sharded"
    models.assert_same_training(ours, theirs)

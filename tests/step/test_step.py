"""The sharded step between threads: bit for bit Chainer's own SMORMS3 on the mean gradients."""

from __future__ import annotations

from typing import Any

from smorms3_dist import create_multi_node_optimizer

import chainer
import models
import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks

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

    def run(collectives: ThreadCollectives) -> chainer.Link:
        model = models.Model()
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), collectives, gradients=gradients
        ).setup(model)
        optimizer.update()
        for step in range(3):
            models.set_gradients(model, collectives.rank, step)
            prepare(model, collectives.rank)
            optimizer.update()
        return model

    return run_ranks(world_size, run)


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


def test_after_a_sharded_step_no_gradient_is_left() -> None:
    for optimizer in models.train_sharded(2, models.Model, STEPS, gradients="sharded"):
        assert all(param.grad is None for param in optimizer.target.params())


def test_after_a_replicated_step_every_rank_has_the_whole_mean_gradient() -> None:
    for optimizer in models.train_sharded(3, models.Model, STEPS, gradients="replicated"):
        for name, param in optimizer.target.namedparams():
            expected = models.mean_gradient(
                [models.gradient(name, param, rank, STEPS[-1]) for rank in range(3)]
            )
            np.testing.assert_array_equal(param.grad, expected)


@pytest.mark.filterwarnings("ignore:.*zerograds? is deprecated")
def test_zerograds_between_replicated_steps() -> None:
    """Backward then adds to the very arrays that hold the last step's mean."""

    def run(collectives: ThreadCollectives) -> chainer.Link:
        model = models.Model()
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.SMORMS3(), collectives, gradients="replicated"
        ).setup(model)
        optimizer.update()
        for step in range(3):
            model.zerograds()
            for name, param in model.namedparams():
                param.grad += models.gradient(name, param, collectives.rank, step)
            optimizer.update()
        return model

    theirs = models.Model()
    models.train_with_chainer(theirs, 3, range(3))
    # Zero plus a value is the value, but for the sign of zero.
    for model in run_ranks(3, run):
        for name, array in models.arrays(model).items():
            np.testing.assert_array_equal(array, models.arrays(theirs)[name])


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

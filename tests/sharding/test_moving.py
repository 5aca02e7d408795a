"""Models that change between steps: the other parameters keep their states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smorms3_dist import create_multi_node_optimizer

import chainer
import chainer.functions as F
import chainer.links as L
import models
import numpy as np
import pytest
from chainer import optimizers
from rank_threads import ThreadCollectives, run_ranks

MODES = ["sharded", "replicated"]


def batch(rank: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState([rank, step])
    return rng.standard_normal((4, 6)).astype("f"), rng.randint(0, 3, 4).astype("i")


class TwoHeads(chainer.Chain):
    """One head is used from the beginning, the other later; both are created lazily."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        rng = np.random.RandomState(seed)

        def initializer(array: np.ndarray) -> None:
            array[...] = rng.standard_normal(array.shape) * 0.1

        with self.init_scope():
            self.body = L.Linear(None, 5, initialW=initializer)
            self.first = L.Linear(None, 3, initialW=initializer)
            self.second = L.Linear(None, 3, initialW=initializer)

    def loss(self, x: np.ndarray, y: np.ndarray, second: bool) -> chainer.Variable:
        h = F.tanh(self.body(x))
        result = F.softmax_cross_entropy(self.first(h), y)
        return result + F.softmax_cross_entropy(self.second(h), y) if second else result


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
@pytest.mark.parametrize("on", [[0], [1], [0, 1, 2]])
def test_a_late_initialization_on_some_ranks_reaches_all_and_keeps_the_other_states(
    on: list[int], gradients: str
) -> None:
    def run(collectives: ThreadCollectives) -> Any:
        model = TwoHeads()
        optimizer = models.optimizer_for(model, collectives, gradients=gradients)
        for step in range(6):
            second = step >= 3 and collectives.rank in on
            optimizer.update(model.loss, *batch(collectives.rank, step), second)
        return optimizer

    optimizers = run_ranks(3, run)
    models.assert_alike([optimizer.target for optimizer in optimizers])
    # Calls 0 and 3 broadcast.
    assert [optimizer.t for optimizer in optimizers] == [4, 4, 4]
    states = models.gathered_states(optimizers)
    expected = expected_late_initialization(on)
    for name, param in expected.namedparams():
        np.testing.assert_allclose(
            states[name]["g2"], np.ravel(param.update_rule.state["g2"]), rtol=2e-5
        )
        mine = dict(optimizers[0].target.namedparams())[name]
        np.testing.assert_allclose(mine.array, param.array, rtol=1e-5, atol=1e-7)


def expected_late_initialization(on: list[int]) -> chainer.Link:
    """The same by Chainer: the mean gradient of all ranks, without the calls that broadcast."""
    model = TwoHeads()
    model.loss(*batch(0, 0), False)
    optimizer = chainer.optimizers.SMORMS3().setup(model)
    for step in (1, 2, 3, 4, 5):
        means: dict[str, Any] = {}
        for rank in range(3):
            model.cleargrads()
            model.loss(*batch(rank, step), step >= 3 and rank in on).backward()
            for name, param in model.namedparams(include_uninit=False):
                grad = np.zeros_like(param.array) if param.grad is None else param.grad
                means[name] = means.get(name, 0) + grad / 3
        if step == 3:
            continue
        for name, param in model.namedparams(include_uninit=False):
            param.grad = np.asarray(means[name], "f")
        optimizer.update()
    return model


def plain_like(model: Any, world_size: int, change: Callable[[Any, Any, int], None]) -> Any:
    """Trains a model by Chainer on the mean gradients; calls that broadcast are left out."""
    optimizer = chainer.optimizers.SMORMS3().setup(model)
    for step in range(1, 9):
        change(model, optimizer, step)
        models.set_mean_gradients(model, world_size, step)
        if step != 4:
            optimizer.update()
    return model


def sharded_like(
    collectives: ThreadCollectives, model: Any, change: Callable[[Any, Any, int], None]
) -> Any:
    optimizer = models.optimizer_for(model, collectives)
    optimizer.update()
    for step in range(1, 9):
        change(model, optimizer, step)
        models.set_gradients(model, collectives.rank, step)
        optimizer.update()
    return optimizer


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_link_added_after_setup_is_trained_and_the_others_keep_their_states(
    world_size: int,
) -> None:
    def add(model: Any, optimizer: Any, step: int) -> None:
        if step == 4:
            model.add_link("late", models.Model({"w": (30, 7)}, seed=3))
            if isinstance(optimizer, chainer.GradientMethod):
                # Chainer leaves it without a rule, and it never moves.
                model.late.w.update_rule = optimizer.create_update_rule()

    theirs = plain_like(chainer.Chain(inner=models.Model()), world_size, add)
    for optimizer in run_ranks(
        world_size, lambda c: sharded_like(c, chainer.Chain(inner=models.Model()), add)
    ):
        models.assert_same_bits(optimizer.target, theirs)
        assert optimizer.target.late.w.update_rule.t == 4


@pytest.mark.parametrize("world_size", [1, 3])
def test_parameters_that_move_to_another_name_keep_their_states(world_size: int) -> None:
    def swap(model: Any, optimizer: Any, step: int) -> None:
        if step == 4:
            a, g = model.first.a, model.second.g
            with model.first.init_scope(), model.second.init_scope():
                model.first.a, model.second.g = g, a

    def make() -> chainer.Chain:
        return chainer.Chain(first=models.Model(), second=models.Model(seed=2))

    theirs = plain_like(make(), world_size, swap)
    for optimizer in run_ranks(world_size, lambda c: sharded_like(c, make(), swap)):
        models.assert_same_bits(optimizer.target, theirs)
        assert optimizer.target.first.a.shape == (500, 61)


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
def test_a_link_removed_leaves_the_others_as_they_are(gradients: str) -> None:
    def remove(model: Any, optimizer: Any, step: int) -> None:
        if step == 4:
            del model.first

    def make() -> chainer.Chain:
        return chainer.Chain(first=models.Model(), second=models.Model(seed=2))

    theirs = plain_like(make(), 3, remove)
    for optimizer in run_ranks(3, lambda c: sharded_like(c, make(), remove)):
        models.assert_same_bits(optimizer.target, theirs)


@pytest.mark.parametrize("gradients", MODES)
def test_a_rule_of_another_kind_in_mid_training_costs_no_step_and_no_other_state(
    gradients: str,
) -> None:
    def train(model: Any, optimizer: Any, set_gradients: Callable[[int], None]) -> Any:
        for step in range(1, 9):
            if step == 4:
                model.a.update_rule = optimizers.momentum_sgd.MomentumSGDRule(lr=0.5)
            if step == 6:
                model.g.update_rule = models.NormalizedRule()
            set_gradients(step)
            optimizer.update()
        return model

    def run(collectives: ThreadCollectives) -> Any:
        model = models.Model()
        optimizer = create_multi_node_optimizer(
            optimizers.Adam(), collectives, gradients=gradients
        ).setup(model)
        optimizer.update()
        return train(
            model, optimizer, lambda step: models.set_gradients(model, collectives.rank, step)
        )

    theirs = models.Model()
    train(
        theirs,
        optimizers.Adam().setup(theirs),
        lambda step: models.set_mean_gradients(theirs, 3, step),
    )
    for model in run_ranks(3, run):
        models.assert_same_bits(model, theirs)

"""Models that change between steps: the other parameters keep their states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import models
import numpy as np
import pytest
from chainer import optimizers

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


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("on", [[0], [1], [0, 1, 2]])
def test_a_late_initialization_on_some_ranks_reaches_all_and_keeps_the_other_states(
    on: list[int], gradients: str
) -> None:
    def body(optimizer: Any, rank: int) -> Any:
        for step in range(6):
            optimizer.update(optimizer.target.loss, *batch(rank, step), step >= 3 and rank in on)
        return optimizer

    trained = models.on_ranks(3, body, make_model=TwoHeads, gradients=gradients)
    models.assert_alike([optimizer.target for optimizer in trained])
    # Calls 0 and 3 broadcast.
    assert [optimizer.t for optimizer in trained] == [4, 4, 4]
    states = models.gathered_states(trained)
    expected = expected_late_initialization(on)
    for name, param in expected.namedparams():
        np.testing.assert_allclose(
            states[name]["g2"], np.ravel(param.update_rule.state["g2"]), rtol=2e-5
        )
        mine = dict(trained[0].target.namedparams())[name]
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


def add_late(optimizer: Any) -> None:
    optimizer.target.add_link("late", models.Model({"w": (30, 7)}, seed=3))
    if isinstance(optimizer, chainer.GradientMethod):
        # Chainer leaves it without a rule, and it never moves.
        optimizer.target.late.w.update_rule = optimizer.create_update_rule()


def swap_parameters(optimizer: Any) -> None:
    first, second = optimizer.target.first, optimizer.target.second
    a, g = first.a, second.g
    with first.init_scope(), second.init_scope():
        first.a, second.g = g, a


def remove_first(optimizer: Any) -> None:
    del optimizer.target.first


def replace_rules(optimizer: Any) -> None:
    optimizer.target.first.a.update_rule = optimizers.momentum_sgd.MomentumSGDRule(lr=0.5)
    optimizer.target.second.g.update_rule = models.NormalizedRule()


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("change", "broadcasts"),
    [(add_late, True), (swap_parameters, True), (remove_first, True), (replace_rules, False)],
)
def test_all_that_is_left_in_a_model_that_changes_keeps_its_states(
    change: Callable[[Any], None], broadcasts: bool, world_size: int, gradients: str
) -> None:
    model = chainer.Chain(first=models.Model(), second=models.Model(seed=2))
    theirs = chainer.optimizers.Adam().setup(copy.deepcopy(model))
    for step in range(1, 9):
        if step == 4:
            change(theirs)
        models.set_mean_gradients(theirs.target, world_size, step)
        # A call that broadcasts makes no step.
        if step != 4 or not broadcasts:
            theirs.update()

    def body(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, range(4))
        change(optimizer)
        models.train(optimizer, rank, range(4, 9))
        assert optimizer.t == theirs.t
        models.assert_same_bits(optimizer.target, theirs.target)

    models.on_ranks(
        world_size, body, chainer.optimizers.Adam, lambda: copy.deepcopy(model), gradients=gradients
    )

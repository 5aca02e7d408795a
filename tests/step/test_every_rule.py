"""Steps of every rule of Chainer's by the fused update: its bits, and no code of the rule's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smorms3_dist.kernels import selection
from smorms3_dist.sharding import group
from smorms3_dist.step.way import Way

import chainer
import models
import numpy as np
import pytest
from chainer import optimizer_hooks, optimizers
from chainer.optimizers.sgd import SGDRule
from rule_variants import VARIANTS

STEPS = range(1, 6)
# One without axes is left to the rule's own code: NumPy 1 computes it in float64.
SHAPES = {name: shape for name, shape in models.SHAPES.items() if shape}
HALF = {"a": "float16", "c": "float16", "g": "float16"}


@pytest.fixture
def own_code(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the parameters whose rules have run their own code."""
    ran: list[str] = []
    run_rule = group.run_rule

    def noted(rule: Any, view: Any, *args: Any) -> None:
        ran.append(view.param.name)
        run_rule(rule, view, *args)

    monkeypatch.setattr(group, "run_rule", noted)
    return ran


def scaled(optimizer: Any) -> None:
    optimizer.set_loss_scale(96.0)
    for param in optimizer.target.params():
        param._loss_scale = 96.0


def decaying(optimizer: Any) -> None:
    scaled(optimizer)
    optimizer.add_hook(optimizer_hooks.WeightDecay(0.01))
    optimizer.target.g.update_rule.add_hook(optimizer_hooks.WeightDecay(0.02))


def clipping(optimizer: Any) -> None:
    optimizer.add_hook(optimizer_hooks.GradientClipping(0.5))
    decaying(optimizer)


def in_fp32(optimizer: Any) -> None:
    clipping(optimizer)
    optimizer.add_hook(optimizer_hooks.GradientLARS(weight_decay=0.01))
    optimizer.use_fp32_update()


CASES = [
    (4, lambda optimizer: None, {}, Way.STREAMED),
    (2, decaying, {}, Way.STREAMED),
    (1, clipping, {}, Way.CHECKED),
    (2, clipping, {}, Way.CHECKED),
    (2, in_fp32, HALF, Way.CHECKED),
]


@pytest.mark.skipif(
    selection.compiled_update(np.dtype("float32")) is None, reason="Numba is not installed"
)
@pytest.mark.parametrize("rule", VARIANTS)
@pytest.mark.parametrize(("world_size", "configure", "dtypes", "way"), CASES)
def test_steps_equal_chainers_without_its_code(
    rule: str, world_size: int, configure: Any, dtypes: Any, way: Way, own_code: list[str]
) -> None:
    def make_model() -> chainer.Link:
        return models.Model(SHAPES, dtypes)

    theirs, make = make_model(), VARIANTS[rule]
    models.train_with_chainer(theirs, world_size, STEPS, configure, make=make)
    ours = models.train_sharded(world_size, make_model, STEPS, configure, make=make)
    models.assert_same_training(ours, theirs)
    assert [optimizer._way for optimizer in ours] == [way] * world_size
    assert own_code == []


def patched(optimizer: Any) -> None:
    rule = optimizer.target.g.update_rule
    rule.update_core = lambda param: SGDRule(lr=0.5).update_core(param)


def widened(optimizer: Any) -> None:
    optimizer.target.g.update_rule.hyperparam.beta1 = np.float64(0.7)


@pytest.mark.parametrize(
    ("configure", "make"),
    [(patched, optimizers.Adam), (patched, optimizers.AdaBound), (widened, optimizers.Adam)],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_a_formula_would_pass_over_is_left_to_the_rules_own_code(
    world_size: int,
    configure: Callable[[Any], None],
    make: Any,
    own_code: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    group._say_that_numbers_widen.cache_clear()
    theirs = models.Model(SHAPES)
    models.train_with_chainer(theirs, world_size, STEPS, configure, make=make)
    for optimizer in models.train_sharded(
        world_size, lambda: models.Model(SHAPES), STEPS, configure, make=make
    ):
        models.assert_same_bits(optimizer.target, theirs)
    assert set(own_code) == {"g"}
    said = [message for message in caplog.messages if "NumPy's numbers" in message]
    assert len(said) == (configure is widened)


def test_a_class_of_chainers_with_another_method_is_something_else(
    monkeypatch: pytest.MonkeyPatch, own_code: list[str]
) -> None:
    def update_core_cpu(self: Any, param: Any) -> None:
        param.array -= 0.5 * param.grad

    monkeypatch.setattr(SGDRule, "update_core_cpu", update_core_cpu)
    theirs = models.Model(SHAPES)
    models.train_with_chainer(theirs, 2, STEPS, make=optimizers.SGD)
    for optimizer in models.train_sharded(
        2, lambda: models.Model(SHAPES), STEPS, make=optimizers.SGD
    ):
        models.assert_same_bits(optimizer.target, theirs)
    assert own_code


def test_a_tied_parameter_has_the_constants_of_each_of_its_updates() -> None:
    # Adam's rate depends on the count, which rises by two a step.
    for kind in optimizers.Adam, optimizers.MSVAG:
        theirs = models.Tied()
        models.train_with_chainer(theirs, 2, STEPS, make=kind)
        for optimizer in models.train_sharded(2, models.Tied, STEPS, make=kind):
            models.assert_same_bits(optimizer.target, theirs)


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
@pytest.mark.parametrize("rule", ["SMORMS3", "Adam", "MSVAG"])
def test_what_a_hook_of_a_rule_changes_in_it_counts_in_the_same_step(
    rule: str, gradients: str
) -> None:
    def schedule(optimizer: Any) -> None:
        def shrink(of: Any, param: Any) -> None:
            of.hyperparam.lr = of.hyperparam.alpha = 0.5 / of.t

        shrink.is_elementwise = True  # type: ignore[attr-defined]
        optimizer.target.g.update_rule.add_hook(shrink, "shrink")

    make = VARIANTS[rule]
    theirs = models.Model()
    models.train_with_chainer(theirs, 2, STEPS, schedule, make=make)
    for ours in models.train_sharded(2, models.Model, STEPS, schedule, gradients, make=make):
        models.assert_same_bits(ours.target, theirs)


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
def test_a_hook_of_a_rule_may_change_a_rule_of_another_group(gradients: str) -> None:
    def change(optimizer: Any) -> None:
        def shrink(of: Any, param: Any) -> None:
            if of.t > 1:
                optimizer.target.g.update_rule.hyperparam.alpha = 0.5 / of.t

        shrink.is_elementwise = True  # type: ignore[attr-defined]
        optimizer.target.a.update_rule.add_hook(shrink, "shrink")

    def make_model() -> chainer.Link:
        return models.Model({"a": (7,), "g": (7, 9), "h": (5,)}, {"a": "float64"})

    theirs = make_model()
    models.train_with_chainer(theirs, 1, STEPS, change, make=optimizers.Adam)
    # On several ranks those that own nothing of it would not be told.
    for ours in models.train_sharded(1, make_model, STEPS, change, gradients, make=optimizers.Adam):
        models.assert_same_bits(ours.target, theirs)


def test_compiled_updates_do_not_warn() -> None:
    def body(optimizer: Any, rank: int) -> None:
        optimizer.update()
        optimizer.target.a.grad = np.array([np.inf, 1e30, 0, 1], "f")
        optimizer.update()
        assert np.isnan(optimizer.target.a.array[0])

    models.on_ranks(1, body, optimizers.Adam, lambda: models.Model({"a": (4,)}))


def test_a_rules_mistake_is_an_error_before_anything_has_changed() -> None:
    def body(optimizer: Any, rank: int) -> None:
        optimizer.update()
        models.set_gradients(optimizer.target, rank, 1)
        before = {name: array.copy() for name, array in models.arrays(optimizer.target).items()}
        optimizer.hyperparam.beta1 = 1.0
        with pytest.raises(ZeroDivisionError):
            optimizer.update()
        for name, array in models.arrays(optimizer.target).items():
            assert np.array_equal(array, before[name])

    models.on_ranks(2, body, optimizers.Adam)

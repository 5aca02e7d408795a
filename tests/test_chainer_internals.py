"""What the package believes of Chainer's private attributes, seen on Chainer's own classes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import smorms3_dist  # noqa: F401  (patches Chainer)
from smorms3_dist import chainer_internals
from smorms3_dist.chainer_internals import LossScaling

import chainer
import models
import numpy as np
import pytest
from chainer import optimizer_hooks
from chainer.optimizers import SMORMS3
from chainer.training import Trainer, extensions
from chainer.training.updaters import StandardUpdater


def set_up(configure: Callable[[Any], None] = lambda optimizer: None) -> Any:
    optimizer = SMORMS3().setup(models.Model({"a": (3,)}, {"a": "float16"}))
    configure(optimizer)
    return optimizer


def dynamic(interval: int, scale: float) -> Callable[[Any], None]:
    def configure(optimizer: Any) -> None:
        optimizer.loss_scaling(interval=interval)
        optimizer._loss_scale = scale

    return configure


def backward(optimizer: Any, factor: float = 1) -> None:
    """An update by a real backward pass, of which the gradient overflows if the factor is large."""
    a = optimizer.target.a
    with np.errstate(all="ignore"):
        optimizer.update(lambda: chainer.functions.sum(a * np.full(3, factor, "float16")))


# The loss scale


def test_without_loss_scaling_there_is_none() -> None:
    assert LossScaling.of(set_up()) is None


def test_a_static_scale_is_read_and_noted_in_the_parameters_that_were_used() -> None:
    optimizer = set_up(lambda optimizer: optimizer.set_loss_scale(8))
    assert LossScaling.of(optimizer) == LossScaling(8.0, False, False)
    assert not chainer_internals.is_loss_scale_dynamic(optimizer)
    a = optimizer.target.a
    assert chainer_internals.loss_scale_of(a) is None
    chainer.functions.sum(a).backward(loss_scale=8)
    assert chainer_internals.loss_scale_of(a) == 8
    assert a.grad.tolist() == [8, 8, 8]


@pytest.mark.filterwarnings("ignore:Non finite number found in param.grad")
def test_a_dynamic_scale_is_read_at_every_moment() -> None:
    optimizer = set_up(dynamic(1, 4.0))
    assert LossScaling.of(optimizer) == LossScaling(4.0, True, False)
    backward(optimizer)
    assert LossScaling.of(optimizer) == LossScaling(8.0, True, False)
    backward(optimizer, factor=60000)
    assert LossScaling.of(optimizer) == LossScaling(4.0, True, True)


@pytest.mark.filterwarnings("ignore:Non finite number found in param.grad")
def test_what_is_restored_goes_on_as_what_was_saved() -> None:
    def train(optimizer: Any, factors: list[float]) -> list[float]:
        scales = []
        for factor in factors:
            backward(optimizer, factor)
            scales.append(optimizer._loss_scale)
        return scales

    first = set_up(dynamic(4, 1000.0))
    train(first, [1, 60000, 1])
    saved = LossScaling.of(first)
    assert saved is not None and saved.was_too_large
    second = set_up(dynamic(4, 1000.0))
    saved.restore(second)
    assert LossScaling.of(second) == saved
    assert train(second, [1, 1, 60000, 1]) == train(first, [1, 1, 60000, 1])


@pytest.mark.parametrize(
    ("saved", "configure", "expected"),
    [
        # A scale in the script counts more than one that was saved.
        (LossScaling(8.0, False, False), lambda o: None, 8.0),
        (LossScaling(8.0, False, False), lambda o: o.set_loss_scale(2.0), 2.0),
        (LossScaling(8.0, False, False), dynamic(1, 2.0), 2.0),
        (LossScaling(8.0, True, True), dynamic(1, 2.0), 8.0),
        (LossScaling(8.0, True, True), lambda o: o.set_loss_scale(2.0), 2.0),
        (LossScaling(8.0, True, True), lambda o: None, None),
    ],
)
def test_what_is_restored_under_which_settings(
    saved: LossScaling, configure: Callable[[Any], None], expected: float | None
) -> None:
    optimizer = set_up(configure)
    dynamic = chainer_internals.is_loss_scale_dynamic(optimizer)
    saved.restore(optimizer)
    assert optimizer._loss_scale == expected
    assert chainer_internals.is_loss_scale_dynamic(optimizer) == dynamic


@pytest.mark.parametrize("finite", [True, False])
def test_whether_gradients_are_finite_decides_as_chainers_own_check(finite: bool) -> None:
    ours, theirs = (set_up(dynamic(1, 4.0)) for _ in range(2))
    theirs.target.a.grad = np.array([1, 2, 3 if finite else np.inf], "float16")
    if finite:
        theirs.check_nan_in_grads()
    else:
        with pytest.warns(UserWarning, match="Non finite number"):
            theirs.check_nan_in_grads()
    chainer_internals.note_finite(ours, finite)
    for optimizer in (ours, theirs):
        assert optimizer.is_safe_to_update() is finite
        optimizer.update_loss_scale()
    assert ours._loss_scale == theirs._loss_scale == (8.0 if finite else 2.0)


# Hooks, states and masters


def test_hooks_come_in_the_order_of_their_calls() -> None:
    assert list(chainer_internals.hooks_of(SMORMS3())) == []
    optimizer = set_up()
    decay, lasso = optimizer_hooks.WeightDecay(0.1), optimizer_hooks.Lasso(0.1)
    optimizer.add_hook(decay, timing="post")
    optimizer.add_hook(lasso)
    assert list(chainer_internals.hooks_of(optimizer)) == [("Lasso", lasso), ("WeightDecay", decay)]
    assert list(chainer_internals.hooks_of(optimizer, "pre")) == [("Lasso", lasso)]
    assert list(chainer_internals.hooks_of(optimizer, "post")) == [("WeightDecay", decay)]


def test_hooks_of_a_rule_are_called_with_it_and_the_parameter() -> None:
    optimizer, seen = set_up(), []
    a = optimizer.target.a
    a.update_rule.add_hook(lambda *given: seen.append(given), "look")
    chainer_internals.call_hooks_of_rule(a.update_rule, "post", a)
    assert seen == []
    chainer_internals.call_hooks_of_rule(a.update_rule, "pre", a)
    assert seen == [(a.update_rule, a)]


def test_a_stand_in_has_hyperparameters_in_common_and_states_of_its_own() -> None:
    optimizer = set_up()
    backward(optimizer)
    rule = optimizer.target.a.update_rule
    mine = dict(rule.state)
    twin = chainer_internals.stand_in(rule, {})
    assert twin.hyperparam is rule.hyperparam
    assert (twin.state, twin.t) == ({}, 1)
    assert rule.state.keys() == mine.keys() == {"mem", "g", "g2"}
    chainer_internals.set_state(rule, None)
    assert rule.state is None


def test_masters_are_those_that_chainer_updates() -> None:
    optimizer = set_up(lambda optimizer: optimizer.use_fp32_update())
    a = optimizer.target.a
    rule = a.update_rule
    assert chainer_internals.uses_fp32_update(optimizer)
    assert chainer_internals.uses_fp32_update(rule)
    assert chainer_internals.master_of(rule) is None
    chainer_internals.set_master(rule, np.full(3, 2.0, "f"), "a")
    a.grad = np.ones(3, "float16")
    rule.update(a)
    master = chainer_internals.master_of(rule)
    assert master.dtype == np.float32 and (master < 2).all()
    assert a.array.tolist() == master.astype("float16").tolist()
    chainer_internals.set_master(rule, None)
    assert chainer_internals.master_of(rule) is None
    assert not chainer_internals.uses_fp32_update(set_up())


@pytest.mark.filterwarnings("ignore:.*use_cleargrads is deprecated")
def test_gradients_are_cleared_unless_the_optimizer_was_told_to_zero_them() -> None:
    optimizer = set_up()
    assert chainer_internals.uses_cleargrads(optimizer)
    optimizer.use_cleargrads(False)
    assert not chainer_internals.uses_cleargrads(optimizer)


# Trainers and their extensions


def test_a_trainer_shows_its_iterators_extensions_and_newest_snapshot(tmp_path: Path) -> None:
    optimizer = set_up()
    iterator = chainer.iterators.SerialIterator([1, 2], 1)
    trainer = Trainer(StandardUpdater(iterator, optimizer), out=str(tmp_path))
    assert chainer_internals.iterators_of(trainer.updater) == {"main": iterator}
    assert chainer_internals.iterators_of(object()) == {}
    whole, of_model = extensions.snapshot(), extensions.snapshot_object(optimizer.target, "m")
    trainer.extend(whole, trigger=(3, "iteration"))
    (entry,) = chainer_internals.entries_of(trainer)
    assert (entry.extension, entry.trigger.period) == (whole, 3)
    assert chainer_internals.target_of(whole) is None
    assert chainer_internals.target_of(of_model) is optimizer.target
    pattern = "snapshot_iter_{.updater.iteration}"
    assert chainer_internals.newest_snapshot(pattern, str(tmp_path)) is None
    for number, time in ((9, 2), (10, 3), (11, 1)):
        (tmp_path / f"snapshot_iter_{number}").touch()
        os.utime(tmp_path / f"snapshot_iter_{number}", (time, time))
    assert chainer_internals.newest_snapshot(pattern, str(tmp_path)) == "snapshot_iter_10"


def test_whoever_is_in_a_snapshot_knows_it(tmp_path: Path) -> None:
    seen = []

    class Asks(chainer.Link):
        def serialize(self, serializer: Any) -> None:
            seen.append(chainer_internals.is_in_snapshot_extension())
            seen.append(chainer_internals.is_in_multi_node_checkpointer())

    trainer = Trainer(
        StandardUpdater(chainer.iterators.SerialIterator([1], 1), set_up()), out=str(tmp_path)
    )
    extensions.snapshot_object(Asks(), "asks")(trainer)
    chainer.serializers.save_npz(str(tmp_path / "by hand"), Asks())
    assert seen == [True, False, False, False]

"""What the model is: its rules, and how it must not differ between the ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from smorms3_dist import create_multi_node_optimizer
from smorms3_dist.sharding.model import ModelView

import chainer
import chainer.links as L
import models
import numpy as np
import pytest
from chainer import optimizers
from rank_threads import ThreadCollectives, run_ranks


def test_a_rule_taken_away_on_purpose_is_not_made_again() -> None:
    def body(optimizer: Any, rank: int) -> None:
        model = optimizer.target
        model.inner.g.update_rule = None
        models.train(optimizer, rank, range(2))
        model.add_link("late", models.Model({"w": (30, 7)}, seed=3))
        models.train(optimizer, rank, range(2, 4))
        np.testing.assert_array_equal(model.inner.g.array, models.Model().g.array)
        assert not np.array_equal(model.inner.a.array, models.Model().a.array)
        assert model.inner.g.update_rule is None
        assert model.late.w.update_rule.t == 1

    models.on_ranks(2, body, make_model=lambda: chainer.Chain(inner=models.Model()))

    def run(collectives: ThreadCollectives) -> None:
        # Nor if the wrapped optimizer was set up by itself.
        actual = chainer.optimizers.SMORMS3()
        optimizer = create_multi_node_optimizer(actual, collectives)
        model = models.Model()
        actual.setup(model)
        model.g.update_rule = None
        optimizer.update()
        assert model.g.update_rule is None

    run_ranks(1, run)


def test_the_rules_that_are_made_use_fp32_where_the_optimizer_does() -> None:
    def body(optimizer: Any, rank: int) -> None:
        optimizer.use_fp32_update()
        optimizer.update()
        optimizer.target.add_link("late", models.Model({"w": (30, 7)}, {"w": "float16"}))
        optimizer.update()
        (half,) = [u for u in optimizer.sharded_model.sharded_groups if u.dtype == np.float16]
        assert half.states["mem"].dtype == np.float32

    models.on_ranks(2, body, make_model=lambda: chainer.Chain(inner=models.Model()))


def differing(build: Callable[[int], chainer.Link], world_size: int = 3) -> None:
    run_ranks(world_size, lambda c: models.optimizer_for(build(c.rank), c).update())


def test_a_parameter_tied_on_one_rank_only_is_refused_by_name() -> None:
    def build(rank: int) -> chainer.Link:
        model = chainer.Chain(inner=models.Model({"a": (3,)}))
        if rank == 1:
            model.twin = model.inner.a
            model._params.add("twin")
        return model

    with pytest.raises(
        RuntimeError, match="paths to tied parameters: none on rank 0, 2 to /inner/a on rank 1"
    ):
        differing(build, 2)


def test_models_that_differ_between_ranks_are_refused_by_name_and_rank() -> None:
    with pytest.raises(
        RuntimeError,
        match=r"parameter /b is float32 of shape \(3,\) on rank 0 and float32 of shape \(4,\) "
        "on rank 2",
    ):
        differing(lambda rank: models.Model({"a": (2,), "b": (4 if rank == 2 else 3,)}))
    with pytest.raises(RuntimeError, match=r"parameter /c is missing on rank 0 and .* on rank 1"):
        differing(lambda rank: models.Model({"a": (2,), **({"c": (1,)} if rank == 1 else {})}))


def test_a_model_of_which_nothing_is_initialized_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no initialized parameter"):
        differing(lambda rank: L.Linear(None, 3, nobias=True), 2)


def test_a_view_counts_the_paths_to_a_parameter_and_keeps_chainers_order() -> None:
    model = models.Tied()
    view = ModelView(model)
    assert view.paths == {name: 2 if name == "/inner/g" else 1 for name in view.initialized}
    assert "/twin/g" not in view.initialized
    assert [view.initialized[name] for name in view.names_in_order] == list(model.params())
    assert len(list(view.in_order())) == len(view.initialized) == len(view.names_in_order) - 1


def test_a_view_notices_what_has_changed_since_another() -> None:
    model = chainer.Chain(inner=models.Model(), lazy=L.Linear(None, 3))
    chainer.optimizers.SMORMS3().setup(model)
    before = ModelView(model)
    again = ModelView(model, before)
    assert again.same_structure(before) and again.same_plans(before)
    model.inner.a.update_rule = optimizers.Adam().create_update_rule()
    other_rule = ModelView(model, before)
    assert other_rule.same_structure(before) and not other_rule.same_plans(before)
    model.inner.a.array = model.inner.a.array.astype("d")
    assert not ModelView(model).same_structure(before)
    model.inner.a.array = model.inner.a.array.astype("f")
    assert set(before.uninitialized) == {"/lazy/W"}
    before.initialize({"/lazy/W": (3, 2), "/inner/a": (9, 9)})
    assert model.lazy.W.shape == (3, 2) and model.lazy.W.grad is None
    assert list(before.initialized) == sorted(before.initialized)
    assert {spec.name: spec.shape for spec in before.specs()}["/lazy/W"] == (3, 2)
    assert not before.uninitialized


@pytest.mark.parametrize(
    ("noted", "current", "used", "expected"),
    [
        ({}, None, False, None),
        ({"a": 4.0}, 8.0, True, 8.0),
        ({"a": 8.0, "b": 4.0}, 8.0, False, 8.0),
        # The scale has changed since the backward pass.
        ({"a": 4.0, "b": 2.0}, 8.0, False, 4.0),
        ({}, 8.0, False, None),
    ],
)
def test_the_loss_scale_of_a_step_is_what_its_gradients_have(
    noted: dict[str, float], current: float | None, used: bool, expected: float | None
) -> None:
    model = models.Model({"a": (2,), "b": (2,), "unused": (2,)})
    model.unused._loss_scale = 512.0
    for name in ("a", "b"):
        param = getattr(model, name)
        param.grad = np.ones(2, "f")
        param._loss_scale = noted.get(name)
    view = ModelView(model)
    view.note_loss_scale(current, used)
    assert view.loss_scale == expected


def replace_array(model: Any) -> None:
    model.inner.g.array = model.inner.g.array.copy()


def replace_rule(model: Any) -> None:
    model.inner.g.update_rule = optimizers.SGD().create_update_rule()


def replace_parameter(model: Any) -> None:
    with model.inner.init_scope():
        model.inner.g = chainer.Parameter(model.inner.g.array)


def rename(model: Any) -> None:
    param = model.inner.g
    del model.inner.g
    with model.inner.init_scope():
        model.inner.h = param


def add(model: Any) -> None:
    model.add_link("more", L.Linear(3, 3))


def remove(model: Any) -> None:
    del model.inner.a


def initialize(model: Any) -> None:
    model.lazy.W.initialize((3, 2))


def tie(model: Any) -> None:
    model.inner.c = model.inner.b


@pytest.mark.parametrize(
    "change",
    [replace_array, replace_rule, replace_parameter, rename, add, remove, initialize, tie],
)
def test_a_view_is_current_until_the_model_changes(change: Callable[[Any], None]) -> None:
    model = chainer.Chain(inner=models.Model(), lazy=L.Linear(None, 3))
    chainer.optimizers.SMORMS3().setup(model)
    view = ModelView(model)
    assert not view.is_current()
    view.note_arrays()
    assert view.is_current()
    model.inner.g.array[...] = 7
    model.inner.g.grad = model.inner.g.array * 2
    model.inner.g.update_rule.hyperparam.lr = 0.5
    assert view.is_current()
    assert not copy.deepcopy(view).is_current()
    change(model)
    assert not view.is_current()


def test_a_view_of_float16_parameters_is_made_anew_because_masters_may_come() -> None:
    view = ModelView(models.Model({"a": (3,)}, {"a": "float16"}))
    view.note_arrays()
    assert not view.is_current()

"""Parameters that stand for a part of one: what hooks assign comes back to where it belongs."""

from __future__ import annotations

from smorms3_dist.hooks.views import ParameterView, WholeParameter

import chainer
import numpy as np
import pytest


@pytest.fixture
def whole() -> chainer.Parameter:
    param = chainer.Parameter(np.arange(6, dtype="f"), name="whole")
    param.update_rule = chainer.optimizers.SMORMS3().create_update_rule()
    return param


def view_of(whole: chainer.Parameter, grad: np.ndarray | None) -> ParameterView:
    return ParameterView(whole.array[2:5], grad, whole)


def test_a_view_has_name_and_rule_of_the_whole_and_shares_its_memory(
    whole: chainer.Parameter,
) -> None:
    grad = np.ones(3, "f")
    view = view_of(whole, grad)
    assert view.param.name == "whole"
    assert view.param.update_rule is whole.update_rule
    view.param.array[0] = 9
    view.param.grad[1] = 8
    assert whole.array.tolist() == [0, 1, 9, 3, 4, 5]
    assert grad.tolist() == view.grad.tolist() == [1, 8, 1]


def test_what_is_assigned_comes_back(whole: chainer.Parameter) -> None:
    grad = np.ones(3, "f")
    view = view_of(whole, grad)
    view.param.array = np.full(3, 7, "f")
    view.param.grad = np.full(3, 5, "f")
    view.settle()
    assert whole.array.tolist() == [0, 1, 7, 7, 7, 5]
    assert grad.tolist() == [5, 5, 5]
    # And from now on it is written in place again.
    view.param.array[...] = 6
    view.param.grad[...] = 4
    assert whole.array.tolist() == [0, 1, 6, 6, 6, 5]
    assert grad.tolist() == [4, 4, 4]


def test_a_gradient_that_is_taken_away_counts_as_zeros(whole: chainer.Parameter) -> None:
    grad = np.ones(3, "f")
    view = view_of(whole, grad)
    view.param.cleargrad()
    view.settle()
    assert grad.tolist() == [0, 0, 0]
    assert view.param.grad is grad


def test_a_gradient_may_be_shown_later_with_the_scale_that_it_has(
    whole: chainer.Parameter,
) -> None:
    view = view_of(whole, None)
    view.settle()
    assert view.param.grad is None
    view.show(np.ones(3, "f"), 16.0)
    assert view.param.grad.tolist() == [1, 1, 1]
    assert view.param._loss_scale == 16.0


def test_arrays_are_flat_whatever_hooks_see() -> None:
    param = chainer.Parameter(np.zeros((2, 3), "f"))
    view = ParameterView(param.array, np.ones((2, 3), "f"), param)
    assert view.param.shape == (2, 3)
    assert view.array.shape == view.grad.shape == (6,)


def test_a_whole_parameter_stands_for_itself() -> None:
    param = chainer.Parameter(np.zeros((2, 3), "f"))
    view = WholeParameter(param)
    assert view.param is param
    param.cleargrad()
    view.settle()
    assert param.grad.tolist() == [[0] * 3] * 2
    view.grad[...] = 2
    view.array[...] = 1
    assert (param.array.sum(), param.grad.sum()) == (6, 12)
    # Not initialized, it has nothing to settle.
    lazy = chainer.Parameter(np.float32(0))
    lazy.array = None
    WholeParameter(lazy).settle()
    assert lazy.array is None

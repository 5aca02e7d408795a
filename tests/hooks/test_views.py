"""Parameters that stand for a part of one: what hooks assign comes back to where it belongs."""

from __future__ import annotations

from smorms3_dist.hooks.views import ParameterView, WholeParameter

import chainer
import numpy as np


def test_a_view_shares_memory_name_and_rule_and_what_is_assigned_comes_back() -> None:
    whole = chainer.Parameter(np.arange(6, dtype="f"), name="whole")
    whole.update_rule = chainer.optimizers.SMORMS3().create_update_rule()
    grad = np.ones(3, "f")
    view = ParameterView(whole.array[2:5], grad, whole)
    assert (view.param.name, view.param.update_rule) == ("whole", whole.update_rule)
    view.param.array[0] = 9
    view.param.grad[1] = 8
    assert whole.array.tolist() == [0, 1, 9, 3, 4, 5]
    assert grad.tolist() == view.grad.tolist() == [1, 8, 1]
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
    # A gradient that is taken away counts as zeros.
    view.param.cleargrad()
    view.settle()
    assert grad.tolist() == [0, 0, 0]
    assert view.param.grad is grad


def test_a_gradient_may_be_shown_later_with_its_scale_and_arrays_are_flat() -> None:
    param = chainer.Parameter(np.zeros((2, 3), "f"))
    view = ParameterView(param.array, None, param)
    view.settle()
    assert (view.param.grad, view.param._loss_scale) == (None, None)
    shown = np.ones((2, 3), "f")
    view.show(shown, 16.0)
    assert view.param.grad is shown
    assert view.param._loss_scale == 16.0
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

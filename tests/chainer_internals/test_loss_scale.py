"""What is believed of the loss scale is so in Chainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import smorms3_dist  # noqa: F401  (patches Chainer)
from smorms3_dist.chainer_internals.loss_scale import (
    LossScaling,
    is_loss_scale_dynamic,
    loss_scale_of,
    note_finite,
)

import chainer
import models
import numpy as np
import pytest
from chainer.optimizers import SMORMS3


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


@pytest.mark.filterwarnings("ignore:Non finite number found in param.grad")
def test_a_scale_is_read_at_every_moment_and_noted_in_the_parameters_that_were_used() -> None:
    optimizer = set_up()
    assert LossScaling.of(optimizer) is None
    optimizer.set_loss_scale(8)
    assert LossScaling.of(optimizer) == LossScaling(8.0, False, False)
    assert not is_loss_scale_dynamic(optimizer)
    a = optimizer.target.a
    assert loss_scale_of(a) is None
    chainer.functions.sum(a).backward(loss_scale=8)
    assert loss_scale_of(a) == 8
    assert a.grad.tolist() == [8, 8, 8]
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
    dynamic = is_loss_scale_dynamic(optimizer)
    saved.restore(optimizer)
    assert optimizer._loss_scale == expected
    assert is_loss_scale_dynamic(optimizer) == dynamic


@pytest.mark.parametrize("finite", [True, False])
def test_whether_gradients_are_finite_decides_as_chainers_own_check(finite: bool) -> None:
    ours, theirs = (set_up(dynamic(1, 4.0)) for _ in range(2))
    theirs.target.a.grad = np.array([1, 2, 3 if finite else np.inf], "float16")
    if finite:
        theirs.check_nan_in_grads()
    else:
        with pytest.warns(UserWarning, match="Non finite number"):
            theirs.check_nan_in_grads()
    note_finite(ours, finite)
    for optimizer in (ours, theirs):
        assert optimizer.is_safe_to_update() is finite
        optimizer.update_loss_scale()
    assert ours._loss_scale == theirs._loss_scale == (8.0 if finite else 2.0)

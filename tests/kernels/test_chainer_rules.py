"""The formulas of Chainer's rules, compiled: the same bits as Chainer's own classes, run here."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

from smorms3_dist.kernels.chainer_rules import CHAINER_RULES, application_of
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.operations import Operation, OperationKind

import chainer
import models
import numpy as np
import pytest
from kernel_checks import specials
from rule_variants import VARIANTS

cpu = pytest.importorskip("smorms3_dist.kernels.cpu")

PREPARATION = 0.3, 0.02, 8.0, 0.1
"""A clipping, a weight decay, a loss scale and a weight decay of the rule's own."""

OPERATIONS = (
    Operation(OperationKind.SCALE, PREPARATION[0]),
    Operation(OperationKind.DECAY, PREPARATION[1]),
    Operation(OperationKind.DIVIDE, PREPARATION[2]),
    Operation(OperationKind.DECAY, PREPARATION[3]),
)

# What is compiled: without all that can be done to a mean gradient before, and with all of it.
CASES = [
    pytest.param(make, dtype, whole, id=f"{name}-{dtype}-{'whole' if whole else 'plain'}")
    for name, make in VARIANTS.items()
    for dtype, whole in [("float32", False), ("float32", True), ("float64", True)]
]


def train_both(
    make: Callable[[], chainer.GradientMethod],
    start: np.ndarray,
    grads: list[np.ndarray],
    whole: bool,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Parameter and states after the same gradients, by Chainer and by the compiled loop."""
    param = chainer.Parameter(start.copy())
    rule = make().create_update_rule()
    ours: dict[str, np.ndarray] = {"param": start.copy()}
    scalar = start.dtype.type
    other = np.roll(start, 1)
    for grad in grads:
        with np.errstate(all="ignore"):
            param.grad = (grad + other) * scalar(0.25)
            if whole:
                prepare(param)
            rule.t += 1
            told = application_of(type(rule), rule, start.dtype)
            rule.t -= 1
            rule.update(param)
        assert told is not None
        formula, constants = told
        for name in formula.states:
            initial = np.ones_like(start) if name == "mem" else np.zeros_like(start)
            ours.setdefault(name, initial)
        mean = Mean(grad, other, 0.25)
        states = [ours[name] for name in formula.states]
        cpu.update(formula, ours["param"], mean, states, constants, OPERATIONS if whole else ())
    return {"param": param.array, **rule.state}, ours


def prepare(param: chainer.Parameter) -> None:
    """What hooks of Chainer's and its loss scaling do to a gradient, in their order."""
    factor, decay, scale, own_decay = PREPARATION
    grad = param.grad
    grad *= grad.dtype.type(factor)
    chainer.optimizer_hooks.WeightDecay(decay)(None, param)
    grad /= scale
    chainer.optimizer_hooks.WeightDecay(own_decay)(None, param)


@pytest.mark.parametrize(("make", "dtype", "whole"), CASES)
def test_steps_equal_chainer_bit_for_bit(make: Any, dtype: str, whole: bool) -> None:
    rng = np.random.RandomState(0)
    for size in 0, 1, 3, 7, 1029:
        start = rng.standard_normal(size).astype(dtype)
        grads = [
            (rng.standard_normal(size) * 10.0 ** rng.randint(-8, 3, size)).astype(dtype)
            for _ in range(7)
        ]
        for grad in grads:
            grad.flags.writeable = False
        theirs, ours = train_both(make, start, grads, whole)
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert models.bits(ours[name]) == models.bits(expected), (size, name)


@pytest.mark.parametrize(("make", "dtype", "whole"), CASES)
def test_zeros_subnormals_infinities_and_nans_equal_chainer(
    make: Any, dtype: str, whole: bool
) -> None:
    values = specials(dtype)
    first, second = (a.reshape(-1) for a in np.meshgrid(values, values, indexing="ij"))
    # Looked at after one step as well: what is nan by then hides all that comes after.
    for grads in [first], [first, second, first]:
        theirs, ours = train_both(make, np.ones_like(first), grads, whole)
        for name, expected in theirs.items():
            assert models.bits(ours[name]) == models.bits(expected), name
    assert np.isfinite(ours["param"]).any()


def test_every_rule_of_chainers_has_a_formula() -> None:
    kinds = {type(make().create_update_rule()) for make in VARIANTS.values()}
    assert kinds == CHAINER_RULES.keys()


@pytest.mark.parametrize("kind", [chainer.optimizers.Adam, chainer.optimizers.RMSprop])
def test_an_eps_that_is_nothing_is_left_to_the_rule_which_refuses_it(kind: Any) -> None:
    rule = kind(eps=1e-60).create_update_rule()
    rule.t = 1
    assert application_of(type(rule), rule, np.dtype("float32")) is None
    assert application_of(type(rule), rule, np.dtype("float64")) is not None
    none = kind(eps=0).create_update_rule()
    none.t = 1
    assert application_of(type(none), none, np.dtype("float32")) is not None


@pytest.mark.parametrize("make", [VARIANTS["AMSGrad"], VARIANTS["SGD"]])
def test_nothing_of_the_parameters_size_is_allocated(make: Any) -> None:
    rule = make().create_update_rule()
    rule.t = 1
    told = application_of(type(rule), rule, np.dtype("float32"))
    assert told is not None
    formula, constants = told
    param, grad, other, *states = (np.ones(1 << 20, "f") for _ in range(3 + len(formula.states)))
    arguments = formula, param, Mean(grad, other, 0.5), states, constants, OPERATIONS
    cpu.update(*arguments)
    tracemalloc.start()
    try:
        cpu.update(*arguments)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * 1024

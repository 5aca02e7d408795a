"""Operations in the place of Chainer's hooks, in NumPy and compiled: the same bits."""

from __future__ import annotations

from typing import Any

from smorms3_dist.kernels.chainer_rules import Formula
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.operations import Operation, OperationKind, apply
from smorms3_dist.kernels.running_dot import RunningDot

import chainer
import models
import numpy as np
import pytest
from chainer import optimizer_hooks
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import specials

cpu = pytest.importorskip("smorms3_dist.kernels.cpu")

OPERATIONS = [
    Operation(OperationKind.SCALE, np.float32(0.3)),
    Operation(OperationKind.SCALE, np.float64(0.3)),
    Operation(OperationKind.DECAY, 0.02),
    Operation(OperationKind.LASSO, 0.1),
    Operation(OperationKind.CLIP, -0.5, 0.25),
    Operation(OperationKind.DIVIDE, 48.0),
]


def no_update(d: Any, p: Any) -> Any:
    return d


def by_chainer(operation: Operation, grad: np.ndarray, param: np.ndarray) -> None:
    """What a hook, or Chainer itself, does to a gradient in place."""
    kind, number, upper = operation
    if kind is OperationKind.SCALE:
        grad *= number
    elif kind is OperationKind.DIVIDE:
        grad /= number
    else:
        parameter = chainer.Parameter(param)
        parameter.grad = grad
        hook = {
            OperationKind.DECAY: lambda: optimizer_hooks.WeightDecay(number),
            OperationKind.LASSO: lambda: optimizer_hooks.Lasso(number),
            OperationKind.CLIP: lambda: optimizer_hooks.GradientHardClipping(number, upper),
        }[kind]()
        hook(None, parameter)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@given(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=5), st.booleans())
@settings(max_examples=60, deadline=None)
def test_operations_in_any_order_are_chainers_hooks_bit_for_bit(
    dtype: str, operations: list[Operation], is_sum: bool
) -> None:
    rng = np.random.RandomState(0)
    of_many_sizes = (rng.standard_normal(2061) * 10.0 ** rng.randint(-5, 3, 2061)).astype(dtype)
    first = np.concatenate([of_many_sizes, np.repeat(specials(dtype), specials(dtype).size)])
    param = np.concatenate([of_many_sizes[::-1], np.tile(specials(dtype), specials(dtype).size)])
    other = np.roll(first, 3)
    mean = Mean(first, other, 0.5) if is_sum and dtype != "float16" else Mean(first)
    expected = mean.evaluated().copy()
    with np.errstate(all="ignore"):
        for operation in operations:
            by_chainer(operation, expected, param)
    in_numpy = mean.evaluated().copy()
    apply(operations, in_numpy, param)
    assert models.bits(in_numpy) == models.bits(expected)
    if dtype == "float16":
        return
    stored, in_place, updated = np.empty_like(first), first.copy(), param.copy()
    cpu.store(stored, mean, param, tuple(operations))
    cpu.store(in_place, mean._replace(first=in_place), param, tuple(operations))
    cpu.update(Formula((), no_update), updated, mean, [], (), tuple(operations))
    in_second = other.copy()
    cpu.store(
        in_second,
        mean._replace(second=in_second) if mean.second is not None else mean,
        param,
        tuple(operations),
    )
    for ours in stored, in_place, in_second, updated:
        assert models.bits(ours) == models.bits(expected)


@pytest.mark.parametrize("start", [0, 5, 1000])
def test_what_is_stored_is_added_to_a_running_dot(start: int) -> None:
    rng = np.random.RandomState(0)
    first, other, param = (rng.standard_normal(3333).astype("f") for _ in range(3))
    operations = (Operation(OperationKind.DECAY, 0.5),)
    dot, apart = (RunningDot(start + 4000, np.dtype("f"), 32) for _ in range(2))
    out = np.empty_like(first)
    cpu.store(out, Mean(first, other, 0.5), param, operations, dot, start)
    apart.add(out, start)
    assert dot.filled == apart.filled == start + 3333
    assert dot.state.tobytes() == apart.state.tobytes()
    assert np.count_nonzero(dot.state) > 31

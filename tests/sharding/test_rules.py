"""How each update rule is run: fused, on segments or whole, and why."""

from __future__ import annotations

from typing import Any

from smorms3_dist.sharding.rules import Kind, Plan, has_progress, plan, progress_of

import chainer
import models
import numpy as np
import pytest
from chainer import optimizers
from chainer.optimizers.smorms3 import SMORMS3Rule


def planned(rule: Any, dtype: str = "float32") -> Plan:
    param = chainer.Parameter(np.ones((2, 3), dtype))
    param.update_rule = rule
    return plan(param)


def in_fp32(rule: Any, hook: Any = None) -> Any:
    rule.use_fp32_update()
    if hook is not None:
        rule.add_hook(hook, "hook")
    return rule


class OtherArithmetic(SMORMS3Rule):
    def update_core_cpu(self, param: Any) -> None: ...


class OtherArithmeticOnGpus(SMORMS3Rule):
    def update_core_gpu(self, param: Any) -> None: ...


class OwnUpdate(SMORMS3Rule):
    def update(self, param: Any) -> None: ...


class Counting(SMORMS3Rule):
    def init_state(self, param: Any) -> None:
        super().init_state(param)
        self.state["count"] = 0


def adam() -> Any:
    return optimizers.Adam().create_update_rule()


@pytest.mark.parametrize(
    ("make", "dtype", "kind", "label"),
    [
        (lambda: None, "float32", Kind.NONE, "no update rule"),
        (SMORMS3Rule, "float64", Kind.FUSED, "in float64 (mem float64, g float64, g2 float64)"),
        (SMORMS3Rule, "float16", Kind.FUSED, "in float16 (mem float16, g float16, g2 float16)"),
        (
            lambda: in_fp32(SMORMS3Rule()),
            *("float16", Kind.FUSED, "in float32 (mem float32, g float32, g2 float32)"),
        ),
        (optimizers.sgd.SGDRule, "float32", Kind.FUSED, "SGDRule in float32"),
        (adam, "float32", Kind.FUSED, "AdamRule in float32 (m float32, v float32)"),
        (OtherArithmetic, "float32", Kind.ELEMENTWISE, "OtherArithmetic in float32 (mem"),
        (OtherArithmeticOnGpus, "float32", Kind.ELEMENTWISE, "OtherArithmeticOnGpus in float32"),
        (
            lambda: in_fp32(SMORMS3Rule(), chainer.optimizer_hooks.WeightDecay(0.1)),
            *("float16", Kind.FUSED, "in float32"),
        ),
        # A hook may want to see whole parameters that are not masters.
        (lambda: in_fp32(SMORMS3Rule(), print), "float32", Kind.FUSED, "in float32"),
    ],
)
def test_what_runs_on_shards(make: Any, dtype: str, kind: Kind, label: str) -> None:
    found = planned(make(), dtype)
    assert found.kind is kind
    assert label in found.label
    assert found.reason == ""


@pytest.mark.parametrize(
    ("make", "dtype", "reason"),
    [
        (models.NormalizedRule, "float32", "it is not elementwise"),
        (object, "float32", "it is not elementwise"),
        (OwnUpdate, "float32", "it has an update() of its own"),
        (Counting, "float32", "its states are not arrays like the parameter"),
        (
            lambda: in_fp32(SMORMS3Rule(), print),
            *("float16", "its hook 'hook' wants the whole fp32 parameter"),
        ),
    ],
)
def test_what_is_left_to_itself_and_why(make: Any, dtype: str, reason: str) -> None:
    found = planned(make(), dtype)
    assert (found.kind, found.reason) == (Kind.WHOLE, reason)
    assert found.label == f"{type(make()).__name__}, whole"


def test_progress_is_what_an_update_changes_besides_states_and_t() -> None:
    assert not has_progress(adam()) and progress_of(adam()) == {}
    rule = optimizers.MSVAG().create_update_rule()
    rule.t = 3
    assert has_progress(rule)
    assert progress_of(rule) == {"beta_power": rule.beta_power}


def test_rules_that_differ_between_ranks_are_refused_by_parameter_and_rank() -> None:
    def body(optimizer: Any, rank: int) -> None:
        if rank == 1:
            optimizer.target.c.update_rule = optimizers.sgd.SGDRule(lr=0.1)
        optimizer.update()

    with pytest.raises(
        RuntimeError,
        match=r"of the update rule of /c: the optimizer's on rank 0, SGDRule: lr=0.1",
    ):
        models.on_ranks(2, body)

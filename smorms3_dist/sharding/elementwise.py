"""An update rule's own code on segments, one segment at a time.

A rule that treats each element by itself does not see whether it is given a parameter or a part of
one: it runs as a copy of itself (`stand_in`) whose states are views of the shard's.
"""

from __future__ import annotations

from collections.abc import Mapping

from smorms3_dist.chainer_internals import set_state, stand_in
from smorms3_dist.device.memory import Memory
from smorms3_dist.hooks.views import ParameterView
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.sharding.rules import Plan

import chainer
import numpy as np

_NOTHING = "a parameter without elements"


def run_rule(
    rule: chainer.UpdateRule,
    view: ParameterView,
    mean: Mean,
    states: Mapping[str, np.ndarray],
    times: int,
    first: bool,
) -> None:
    """Updates a segment, and its states, in place.

    Args:
        rule: The rule, whose ``t`` counts this step already.
        view: The segment as a Chainer parameter.
        mean: Its mean gradient, flat.
        states: The rule's states of the segment, flat.
        times: How often the update is applied.
        first: Whether the rule has to fill the states.
    """
    shape = view.param.shape
    view.show(mean.evaluated().reshape(shape), None)
    shaped = {name: state.reshape(shape) for name, state in states.items()}
    own = stand_in(rule, dict(shaped))
    if first:
        own.init_state(view.param)
        _copy_state(own, shaped)
    for turn in range(times):
        own.t = rule.t - times + turn + 1
        own.update_core(view.param)
        _copy_state(own, shaped)
        view.settle()
    view.show(None, None)


def run_rule_on_nothing(rule: chainer.UpdateRule, plan: Plan, memory: Memory, times: int) -> None:
    """Lets a rule that changes itself do so, on ranks that own nothing of its parameter, too."""
    nothing = chainer.Parameter(memory.empty(0, plan.dtype, _NOTHING))
    nothing.grad = memory.empty(0, plan.dtype, _NOTHING)
    set_state(rule, {name: memory.empty(0, dtype, _NOTHING) for name, dtype in plan.states})
    for _ in range(times):
        rule.update_core(nothing)
    set_state(rule, None)


def _copy_state(rule: chainer.UpdateRule, states: Mapping[str, np.ndarray]) -> None:
    """Copies states that a rule has put in the place of the given ones into these."""
    own = rule.state
    assert own is not None
    for name, state in states.items():
        if own[name] is not state:
            state[...] = own[name]
            own[name] = state

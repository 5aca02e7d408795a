"""An update rule's own code on segments: one at a time on CPUs, on runs of them on GPUs.

A rule that treats each element by itself does not see whether it is given a parameter, a part of
one, or several: it runs as a copy of itself (`stand_in`) whose states are views of the shard's.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from smorms3_dist.chainer_internals.optimizers import set_state, stand_in
from smorms3_dist.device.memory import Memory
from smorms3_dist.hooks.views import ParameterView
from smorms3_dist.kernels.mean import Mean
from smorms3_dist.kernels.segments import ParameterSettings
from smorms3_dist.layout import Segment
from smorms3_dist.sharding.rules import Plan, changed_values, do_the_same, runs_on_several

import chainer
import numpy as np

_NOTHING = "a parameter without elements"

Items = Sequence[tuple[Segment, ParameterSettings]]


def runs_of(
    items: Items,
    rules: Sequence[chainer.UpdateRule | None],
    fresh: Collection[int],
    largest_gap: int,
) -> Iterator[tuple[list[Segment], ParameterSettings]]:
    """Segments that a rule's own code is given at once: each by itself, or on GPUs runs of them.

    A run may have gaps between its parameters, where what comes out is of no use to anybody.

    Args:
        items: Segments of a piece, in order, and how they are updated.
        rules: The update rules, by slot.
        fresh: The slots whose states the rule has to fill.
        largest_gap: Elements of the largest gap within a run; where it is negative, every segment
            is given by itself.
    """
    run: list[Segment] = []
    told: ParameterSettings | None = None

    def joins(segment: Segment, settings: ParameterSettings) -> bool:
        last, index = run[-1], segment.slot.index
        one, other = rules[last.slot.index], rules[index]
        assert one is not None and other is not None
        gap = segment.start_s - last.stop_s
        return (
            settings == told
            and 0 <= gap <= largest_gap
            and segment.start_f - last.stop_f == gap
            # Arrays without axes may be numbers to a rule.
            and () not in (last.slot.shape, segment.slot.shape)
            and (last.slot.index in fresh) is (index in fresh)
            and runs_on_several(one)
            and do_the_same(one, other)
        )

    for segment, settings in items:
        if told is not None and not joins(segment, settings):
            yield run, told
            run = []
        run.append(segment)
        told = settings
    if told is not None:
        yield run, told


def run_rule(
    rule: chainer.UpdateRule,
    view: ParameterView,
    mean: Mean,
    states: Mapping[str, np.ndarray],
    times: int,
    first: bool,
) -> None:
    """Updates a segment or a run of them, and its states, in place.

    Args:
        rule: The rule, whose ``t`` counts this step already; of a run any of them.
        view: The segment or the run as a Chainer parameter.
        mean: Its mean gradient, flat.
        states: The rule's states there, flat.
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


def run_rules_on_nothing(
    rules: Iterable[tuple[chainer.UpdateRule, int]], plan: Plan, memory: Memory
) -> None:
    """Does so for each rule, and for how often it updates; neighbours that do the same, once."""
    # A rule as it was, how often it has updated, and what that has changed in it.
    known: tuple[chainer.UpdateRule, int, dict[str, Any]] | None = None
    for rule, times in rules:
        if known is not None and known[1] == times and do_the_same(known[0], rule):
            vars(rule).update(known[2])
            continue
        before = stand_in(rule, None)
        run_rule_on_nothing(rule, plan, memory, times)
        changed = changed_values(before, rule)
        known = None if changed is None else (before, times, changed)


def _copy_state(rule: chainer.UpdateRule, states: Mapping[str, np.ndarray]) -> None:
    """Copies states that a rule has put in the place of the given ones into these."""
    own = rule.state
    assert own is not None
    for name, state in states.items():
        if own[name] is not state:
            state[...] = own[name]
            own[name] = state

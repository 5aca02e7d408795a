"""What is believed of update rules is so in Chainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import smorms3_dist  # noqa: F401  (patches Chainer)
from smorms3_dist.chainer_internals.optimizers import RuleWatch

import chainer
import models
import numpy as np
import pytest
from chainer.optimizers import SMORMS3


@pytest.mark.parametrize(
    "change",
    [
        lambda rule: setattr(rule, "enabled", False),
        lambda rule: setattr(rule.hyperparam, "lr", 0.5),
        lambda rule: rule.add_hook(chainer.optimizer_hooks.WeightDecay(0.1)),
        lambda rule: rule.add_hook(chainer.optimizer_hooks.GradientNoise(0.1), timing="post"),
    ],
)
def test_it_is_noticed_when_a_rule_gets_something_of_its_own(
    change: Callable[[Any], None],
) -> None:
    optimizer = SMORMS3().setup(models.Model({"a": (3,), "b": (2,), "c": (1,)}))
    rules = [param.update_rule for param in optimizer.target.params()]
    watch = RuleWatch(rules)
    for _ in range(2):
        assert watch.are_plain() and watch.are_alike()
    change(rules[1])
    for seen in (watch, RuleWatch(rules), copy.deepcopy(watch)):
        for _ in range(2):
            assert not seen.are_plain() and not seen.are_alike()
    assert RuleWatch(rules[::2]).are_plain()


def test_rules_with_states_or_of_two_optimizers_are_not_alike() -> None:
    first, second = (SMORMS3().setup(models.Model({"a": (3,), "b": (2,)})) for _ in range(2))
    rules: list[Any] = [param.update_rule for param in first.target.params()]
    others = [param.update_rule for param in second.target.params()]
    watch = RuleWatch(rules)
    assert watch.are_alike()
    both = RuleWatch([*rules, *others])
    assert both.are_plain() and not both.are_alike()
    assert not RuleWatch().are_alike()
    for states in (np.ones(3), np.ones(3)):
        # The same values in another array are no question of equality.
        rules[0]._state = {"mem": states}
        assert watch.are_plain() and not watch.are_alike()
    rules[0]._state = None
    assert watch.are_alike()


def test_counts_of_rules_go_on_together_until_one_is_set_apart() -> None:
    optimizer = SMORMS3().setup(models.Model({"a": (3,), "b": (2,), "c": (1,)}))
    rules = [param.update_rule for param in optimizer.target.params()]
    watch = RuleWatch(rules)
    assert watch.add_to_counts(2) and [rule.t for rule in rules] == [2, 2, 2]
    rules[1].t = 7
    assert not watch.add_to_counts(1) and [rule.t for rule in rules] == [3, 8, 3]


class CountedByItself(chainer.UpdateRule):
    """A rule that keeps what is asked for elsewhere than other rules."""

    t = property(lambda self: self.steps, lambda self, value: setattr(self, "steps", value))
    enabled = property(lambda self: self.steps < 5, lambda self, value: None)


def test_rules_that_keep_their_attributes_elsewhere_are_looked_at_as_well() -> None:
    settings = chainer.optimizers.SGD().hyperparam
    rules = [CountedByItself(settings) for _ in range(2)]
    watch = RuleWatch(rules)
    assert watch.are_alike()
    watch.add_to_counts(3)
    watch.add_to_counts(3)
    assert [rule.t for rule in rules] == [6, 6]
    assert not watch.are_plain()

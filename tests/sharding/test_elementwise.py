"""Rules' own code on segments: every elementwise rule of Chainer's, and of users."""

from __future__ import annotations

from typing import Any

import chainer
import models
import numpy as np
import pytest
from chainer import optimizers
from chainer.optimizers.smorms3 import SMORMS3Rule

MODES = ["sharded", "replicated"]


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 3])
def test_rules_and_hyperparameters_of_single_parameters(world_size: int, gradients: str) -> None:
    def configure(optimizer: Any) -> None:
        model = optimizer.target
        model.a.update_rule = optimizers.sgd.SGDRule(lr=0.125)
        model.b.update_rule = optimizers.adam.AdamRule(amsgrad=True)
        model.c.update_rule = SMORMS3Rule(lr=0.25)
        model.d.update_rule = None
        model.e.update_rule.enabled = False
        model.g.update_rule.hyperparam.alpha = 0.5

    ours = models.assert_equals_chainer(world_size, gradients, optimizers.Adam, configure)
    kinds = dict.fromkeys("abcefg", "FUSED") | {"d": "NONE"}
    plans = ours[0].sharded_model.model.plans
    assert {name[1:]: plan.kind.name for name, plan in plans.items()} == kinds
    # Nothing but the own shard is kept, and nothing of it by the rules.
    states = models.gathered_states(ours)
    whole = sum(array.nbytes for of_param in states.values() for array in of_param.values())
    assert sum(optimizer.state_bytes() for optimizer in ours) == whole
    for optimizer in ours:
        rules = [param.update_rule for param in optimizer.target.params()]
        assert all(rule is None or rule.state is None for rule in rules)


class DecayingRule(chainer.UpdateRule):
    """An elementwise rule of a user's: states from the parameter, arrays replaced, a count."""

    is_elementwise = True

    def __init__(self) -> None:
        super().__init__()
        self.power = 1.0

    def init_state(self, param: Any) -> None:
        self.state["start"] = param.array.copy()
        self.state["sum"] = np.zeros(param.shape, np.float64)

    def update_core_cpu(self, param: Any) -> None:
        if param.grad is None:
            return
        self.power *= 0.5
        self.state["sum"] = self.state["sum"] + param.grad
        step = param.grad * np.float32(self.power) + 0.125 * (param.array - self.state["start"])
        param.array = np.asarray(param.array - step, param.dtype)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 5])
def test_an_elementwise_rule_of_a_users_on_shards(world_size: int, gradients: str) -> None:
    ours = models.assert_equals_chainer(
        world_size, gradients, lambda: models.OwnOptimizer(DecayingRule)
    )
    # Also where a rank owns nothing of a parameter its rule has come as far as everywhere.
    for optimizer in ours:
        for param in optimizer.target.params():
            assert param.update_rule.power == 0.5**5


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("gradients", MODES)
def test_a_subclass_with_arithmetic_of_its_own_is_not_taken_for_smorms3(gradients: str) -> None:
    class Halved(SMORMS3Rule):
        def update_core_cpu(self, param: Any) -> None:
            before = param.array.copy()
            super().update_core_cpu(param)
            param.array[...] = (param.array + before) / 2

    ours = models.assert_equals_chainer(3, gradients, lambda: models.OwnOptimizer(Halved))
    assert {plan.kind.name for plan in ours[0].sharded_model.model.plans.values()} == {
        "ELEMENTWISE"
    }

"""Rules that are left to themselves: whole arrays, and whole states, on every rank."""

from __future__ import annotations

import functools
import logging
from types import SimpleNamespace
from typing import Any

from smorms3_dist.sharding.whole_group import WholeGroup

import chainer
import models
import numpy as np
import pytest
from chainer import optimizer_hooks, optimizers
from chainer.optimizers.smorms3 import SMORMS3Rule

MODES = ["sharded", "replicated"]


class CountingRule(optimizers.adam.AdamRule):
    """An elementwise rule whose state is no array."""

    def init_state(self, param: Any) -> None:
        super().init_state(param)
        self.state["count"] = 0

    def update_core_cpu(self, param: Any) -> None:
        super().update_core_cpu(param)
        self.state["count"] += 1


class DoubledRule(SMORMS3Rule):
    """A rule with an ``update`` of its own."""

    def update(self, param: Any) -> None:
        super().update(param)
        super().update(param)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        (models.NormalizedRule, "it is not elementwise"),
        (CountingRule, "its states are not arrays like the parameter"),
        (DoubledRule, "it has an update() of its own"),
    ],
)
def test_other_rules_run_whole_on_every_rank_and_rank_0_says_so_once(
    rule: Any, reason: str, world_size: int, gradients: str, caplog: pytest.LogCaptureFixture
) -> None:
    def configure(optimizer: Any) -> None:
        optimizer.target.e.update_rule = SMORMS3Rule()
        optimizer.target.a.update_rule.add_hook(optimizer_hooks.WeightDecay(0.1))
        if gradients == "sharded":
            optimizer.add_hook(optimizer_hooks.Lasso(0.01))

    shapes = {name: shape for name, shape in models.SHAPES.items() if 0 not in shape}
    make_model = functools.partial(models.Model, shapes)
    make = functools.partial(models.OwnOptimizer, rule)
    theirs, steps = make_model(), range(1, 6)
    with caplog.at_level(logging.WARNING, logger="smorms3_dist"):
        models.train_with_chainer(theirs, world_size, steps, configure, make=make)
        ours = models.train_sharded(world_size, make_model, steps, configure, gradients, make=make)
    assert caplog.messages == [
        f"{rule.__name__} runs on whole arrays, with its whole states on every rank: {reason} "
        "(/a, /b, /c, ...)"
    ]
    names = sorted(dict(theirs.namedparams()).keys() - {"/e"})
    states = {name: dict(theirs.namedparams())[name].update_rule.state for name in names}
    for optimizer in ours:
        models.assert_same_bits(optimizer.target, theirs)
        rules = {name: param.update_rule for name, param in optimizer.target.namedparams()}
        assert rules["/e"].state is None
        for name, state in states.items():
            assert rules[name].state.keys() == state.keys() != set()
            for key, values in state.items():
                np.testing.assert_array_equal(rules[name].state[key], values)
    # The states of the one sharded parameter, once; all others on every rank.
    arrays = [values for state in states.values() for values in state.values()]
    whole = sum(values.nbytes for values in arrays if isinstance(values, np.ndarray))
    total = sum(optimizer.state_bytes() for optimizer in ours)
    assert total == world_size * whole + 12 * theirs.e.size


def test_random_hooks_of_whole_rules_do_not_make_ranks_diverge() -> None:
    def body(optimizer: Any, rank: int) -> Any:
        rng = np.random.RandomState(rank)

        def disturb(rule: Any, param: Any) -> None:
            param.grad += rng.standard_normal(param.shape).astype("f")

        for param in optimizer.target.params():
            param.update_rule.add_hook(disturb, "disturb")
        models.train(optimizer, rank, range(3))
        return optimizer.target

    make = functools.partial(models.OwnOptimizer, models.NormalizedRule)
    models.assert_alike(models.on_ranks(3, body, make))


def test_states_are_written_range_by_range_into_the_rules() -> None:
    param = chainer.Parameter(np.zeros((2, 3), "float16"), name="p")
    param.update_rule = models.NormalizedRule()
    memory = SimpleNamespace(empty=lambda size, dtype, what: np.zeros(size, dtype))
    slots = SimpleNamespace(params=[param], memory=memory, parameters=lambda: [(None, param)])
    group = WholeGroup(slots, None)  # type: ignore[arg-type]
    assert group.nbytes == 0
    group.write_state("v", 0, 0, np.array([1, 2], "f"))
    group.write_state("v", 0, 2, np.array([3, 4, 5, 6], "f"))
    group.write_state("fp32_param", 0, 3, np.array([7, 8], "f"))
    assert param.update_rule.state["v"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert param.update_rule._fp32_param.array.tolist() == [[0, 0, 0], [7, 8, 0]]
    assert group.nbytes == 2 * 6 * 4

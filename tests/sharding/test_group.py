"""The states of a group: whose they are, where they come from, when they start afresh."""

from __future__ import annotations

from typing import Any

from smorms3_dist import create_multi_node_optimizer

import chainer
import models
import numpy as np
import pytest
from chainer import optimizers
from rank_threads import ThreadCollectives, run_ranks

MODES = ["sharded", "replicated"]


def test_a_parameter_with_a_new_rule_starts_with_fresh_states() -> None:
    def train(model: Any, optimizer: Any, rank: int, steps: range) -> None:
        for step in steps:
            if step == 3:
                model.g.update_rule = optimizer.create_update_rule()
            models.set_gradients(model, rank, step)
            optimizer.update()

    theirs = models.Model()
    train(theirs, chainer.optimizers.SMORMS3().setup(theirs), 0, range(1, 6))
    ours = models.Model()

    def run(collectives: ThreadCollectives) -> None:
        train(ours, models.optimizer_for(ours, collectives), 0, range(0, 6))

    run_ranks(1, run)
    models.assert_same_bits(ours, theirs)


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
def test_states_from_before_the_wrapping_are_taken_over_and_the_whole_ones_freed(
    gradients: str,
) -> None:
    theirs = models.Model()
    models.train_with_chainer(theirs, 3, range(6))

    def run(collectives: ThreadCollectives) -> Any:
        model = models.Model()
        actual = models.train_with_chainer(model, 3, range(3))
        optimizer = create_multi_node_optimizer(actual, collectives, gradients=gradients)
        optimizer.update()
        assert all(param.update_rule.state is None for param in model.params())
        for step in range(3, 6):
            models.set_gradients(model, collectives.rank, step)
            optimizer.update()
        assert optimizer.t == 6
        return model

    for model in run_ranks(3, run):
        models.assert_same_bits(model, theirs)


def test_states_of_another_model_are_refused_by_name() -> None:
    def run(collectives: ThreadCollectives) -> None:
        model = models.Model()
        optimizer = create_multi_node_optimizer(optimizers.SMORMS3(), collectives).setup(model)
        model.c.update_rule._state = {name: np.ones(3, "f") for name in ("mem", "g", "g2")}
        with pytest.raises(ValueError, match=r"the state mem of parameter /c has shape \(3,\)"):
            optimizer.update()

    run_ranks(1, run)


@pytest.mark.parametrize("start", [0, 100, 15_200, 30_300])
def test_of_a_range_of_states_each_rank_writes_what_it_owns(start: int) -> None:
    values = np.arange(1, 201, dtype="f")
    optimizers_ = models.train_sharded(2, models.Model, [1])
    before = models.gathered_states(optimizers_)["/g"]["g2"]
    for optimizer in optimizers_:
        (group,) = optimizer.sharded_model.groups
        (index,) = (slot.index for slot in group.layout.slots if slot.name == "/g")
        group.write_state("g2", index, start, values)
    after = models.gathered_states(optimizers_)["/g"]["g2"]
    assert after[start : start + 200].tolist() == values.tolist()
    after[start : start + 200] = before[start : start + 200]
    assert after.tolist() == before.tolist()

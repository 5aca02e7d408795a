"""The states of a group: whose they are, where they come from, when they start afresh."""

from __future__ import annotations

from typing import Any

from smorms3_dist import create_multi_node_optimizer

import chainer
import models
import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks


def test_a_parameter_with_a_new_rule_starts_with_fresh_states() -> None:
    def replace(optimizer: Any, step: int) -> None:
        if step == 3:
            optimizer.target.g.update_rule = optimizer.create_update_rule()

    theirs, steps = models.Model(), range(1, 6)
    models.train_with_chainer(theirs, 1, steps, before_step=replace)
    ours = models.train_sharded(1, models.Model, steps, before_step=replace)
    models.assert_same_training(ours, theirs)


@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
def test_states_from_before_the_wrapping_are_taken_over_and_the_whole_ones_freed(
    gradients: str,
) -> None:
    theirs = models.Model()
    models.train_with_chainer(theirs, 3, range(6))

    def run(collectives: ThreadCollectives) -> None:
        model = models.Model()
        actual = models.train_with_chainer(model, 3, range(3))
        optimizer = create_multi_node_optimizer(actual, collectives, gradients=gradients)
        optimizer.update()
        assert all(param.update_rule.state is None for param in model.params())
        models.train(optimizer, collectives.rank, range(3, 6))
        assert optimizer.t == 6
        models.assert_same_bits(model, theirs)

    run_ranks(3, run)


def test_states_of_another_model_are_refused_by_name() -> None:
    def body(optimizer: Any, rank: int) -> None:
        states = {name: np.ones(3, "f") for name in ("mem", "g", "g2")}
        optimizer.target.c.update_rule._state = states
        with pytest.raises(ValueError, match=r"the state mem of parameter /c has shape \(3,\)"):
            optimizer.update()

    models.on_ranks(1, body)


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


def test_parameters_follow_the_optimizer_that_made_their_rules() -> None:
    """Nothing else sets their rules apart."""
    other = chainer.optimizers.SMORMS3(lr=0.5)

    def replace(optimizer: Any, step: int) -> None:
        if step == 2:
            optimizer.target.g.update_rule = other.create_update_rule()
        if step == 4:
            other.lr = 0.25

    theirs, steps = models.Model(), range(1, 7)
    models.train_with_chainer(theirs, 1, steps, before_step=replace)
    other.lr = 0.5
    ours = models.train_sharded(1, models.Model, steps, before_step=replace)
    models.assert_same_training(ours, theirs)

"""A model is laid out, broadcast and trained: at first, set up again, and after a change."""

from __future__ import annotations

from typing import Any

import chainer
import models
import numpy as np
import pytest
from rank_threads import ThreadCollectives, run_ranks

MODES = ["sharded", "replicated"]


def test_the_first_update_broadcasts_rank_0_and_does_not_step() -> None:
    def run(collectives: ThreadCollectives) -> None:
        optimizer = models.optimizer_for(models.Model(seed=collectives.rank), collectives)
        models.train(optimizer, collectives.rank, [0])
        models.assert_same_bits(optimizer.target, models.Model(seed=0))
        assert optimizer.t == 0
        assert all(param.update_rule.t == 0 for param in optimizer.target.params())
        assert (optimizer.collectives.bytes_sent["broadcast"] > 0) == (collectives.rank == 0)

    run_ranks(3, run)


@pytest.mark.parametrize("set_up_again", [False, True])
@pytest.mark.parametrize("gradients", MODES)
def test_a_replaced_link_is_noticed_broadcast_and_trained(
    gradients: str, set_up_again: bool
) -> None:
    def body(optimizer: Any, rank: int) -> chainer.Link:
        model = optimizer.target
        models.train(optimizer, rank, range(3))
        # On each rank with values of its own.
        model.add_link("late", models.Model({"w": (30, 7)}, seed=rank))
        del model.second
        model.add_link("second", models.Model(seed=rank))
        if set_up_again:
            optimizer.setup(model)
        models.train(optimizer, rank, range(3, 5))
        assert optimizer.t == (1 if set_up_again else 3)
        for link in (model.second, model.late):
            start = models.Model(seed=0) if link is model.second else models.Model({"w": (30, 7)})
            for name, array in models.arrays(link).items():
                assert not array.size or not np.array_equal(array, models.arrays(start)[name])
        return model

    def make_model() -> chainer.Chain:
        return chainer.Chain(first=models.Model(), second=models.Model(seed=2))

    links = models.on_ranks(3, body, make_model=make_model, gradients=gradients)
    models.assert_alike(links)


def test_setting_up_again_starts_afresh_without_a_broadcast() -> None:
    theirs = models.Model()
    models.train_with_chainer(theirs, 2, range(3))

    def body(optimizer: Any, rank: int) -> None:
        models.train(optimizer, rank, range(3))
        for name, array in models.arrays(optimizer.target).items():
            array[...] = models.arrays(models.Model())[name]
        optimizer.setup(optimizer.target)
        assert optimizer.t == 0
        models.train(optimizer, rank, range(3))
        assert optimizer.t == 3
        models.assert_same_bits(optimizer.target, theirs)

    models.on_ranks(2, body)


def test_a_step_may_follow_the_broadcast_in_the_same_call_if_one_rank_wants_so() -> None:
    def run(collectives: ThreadCollectives) -> Any:
        model = models.Model(seed=collectives.rank)
        optimizer = models.optimizer_for(
            model, collectives, step_after_broadcast=collectives.rank == 1
        )
        models.train(optimizer, collectives.rank, range(2))
        with model.init_scope():
            model.b = chainer.Parameter(np.full(1, collectives.rank, "f"))
        models.train(optimizer, collectives.rank, range(2, 4))
        assert optimizer.t == 4
        return model

    models.assert_alike(run_ranks(3, run))


def test_parts_come_in_the_order_in_which_chainer_calls_hooks() -> None:
    (optimizer,) = models.train_sharded(1, models.Tied, [1])
    sharded = optimizer.sharded_model
    sharded.stage()
    names = {id(param): name for name, param in sharded.model.parameters()}
    in_order = [names[id(param)] for param in optimizer.target.params()]
    assert in_order.count("/inner/g") == 2
    assert [part.name for part in sharded.parts(None)] == in_order
    backwards = list(reversed(sharded.parts(None)))
    assert [part.name for part in sharded.in_order_of_hooks(backwards)] == [
        *dict.fromkeys(in_order)
    ]

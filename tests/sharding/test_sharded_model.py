"""A model is laid out, broadcast and trained: at first, set up again, and after a change."""

from __future__ import annotations

from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import models
import numpy as np
from rank_threads import ThreadCollectives, run_ranks

MODES = ["sharded", "replicated"]


def test_the_first_update_broadcasts_rank_0_and_does_not_step() -> None:
    def run(collectives: ThreadCollectives) -> Any:
        model = models.Model(seed=collectives.rank)
        optimizer = models.optimizer_for(model, collectives)
        models.set_gradients(model, collectives.rank, 0)
        optimizer.update()
        return optimizer

    optimizers = run_ranks(3, run)
    for optimizer in optimizers:
        models.assert_same_bits(optimizer.target, models.Model(seed=0))
        assert optimizer.t == 0
        assert all(param.update_rule.t == 0 for param in optimizer.target.params())
    assert optimizers[0].collectives.bytes_sent["broadcast"] > 0


def batch(rank: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.RandomState([rank, step])
    return rng.standard_normal((4, 6)).astype("f"), rng.randint(0, 3, 4).astype("i")


def test_a_replaced_link_is_noticed_broadcast_and_trained() -> None:
    def run(collectives: ThreadCollectives) -> Any:
        model = chainer.Sequential(L.Linear(6, 5), F.tanh, L.Linear(5, 3))
        optimizer = models.optimizer_for(model, collectives)

        def loss(x: np.ndarray, y: np.ndarray) -> chainer.Variable:
            return F.softmax_cross_entropy(model(x), y)

        for step in range(2):
            optimizer.update(loss, *batch(collectives.rank, step))
        model[2] = L.Linear(5, 3)
        for param in model[2].params():
            param.update_rule = optimizer.create_update_rule()
        optimizer.update(loss, *batch(collectives.rank, 2))
        new = model[2].W.array.copy()
        optimizer.update(loss, *batch(collectives.rank, 3))
        assert not np.array_equal(new, model[2].W.array)
        return model

    models.assert_alike(run_ranks(3, run))


def test_setting_up_again_starts_afresh_without_a_broadcast() -> None:
    def configure_again(optimizer: Any) -> None:
        optimizer.setup(optimizer.target)

    def run(collectives: ThreadCollectives) -> Any:
        model = models.Model()
        optimizer = models.optimizer_for(model, collectives)
        for step in range(3):
            models.set_gradients(model, collectives.rank, step)
            optimizer.update()
        for name, param in model.namedparams():
            param.array[...] = dict(models.Model().namedparams())[name].array
        optimizer.setup(model)
        assert optimizer.t == 0
        for step in range(3):
            models.set_gradients(model, collectives.rank, step)
            optimizer.update()
        return optimizer

    theirs = models.Model()
    models.train_with_chainer(theirs, 2, range(3))
    for optimizer in run_ranks(2, run):
        assert optimizer.t == 3
        models.assert_same_bits(optimizer.target, theirs)


def test_a_step_may_follow_the_broadcast_in_the_same_call() -> None:
    def run(collectives: ThreadCollectives) -> Any:
        model = models.Model(seed=collectives.rank)
        optimizer = models.optimizer_for(model, collectives, step_after_broadcast=True)
        for step in range(4):
            if step == 2:
                with model.init_scope():
                    model.b = chainer.Parameter(np.full(1, collectives.rank, "f"))
            models.set_gradients(model, collectives.rank, step)
            optimizer.update()
        assert optimizer.t == 4
        return model

    first, *others = run_ranks(3, run)
    models.assert_alike([first, *others])


def test_one_rank_that_wants_a_step_after_the_broadcast_is_enough() -> None:
    def run(collectives: ThreadCollectives) -> int:
        model = models.Model()
        optimizer = models.optimizer_for(
            model, collectives, step_after_broadcast=collectives.rank == 1
        )
        models.set_gradients(model, collectives.rank, 0)
        optimizer.update()
        return optimizer.t

    assert run_ranks(3, run) == [1, 1, 1]


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

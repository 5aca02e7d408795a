"""Several micro-batches make one update, as one large batch does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import smorms3_dist
from smorms3_dist import create_multi_node_optimizer

import chainer
import chainer.functions as F
import chainer.links as L
import models
import numpy as np
import pytest
from chainer import training
from chainer.datasets import TupleDataset
from chainer.training import extensions
from rank_threads import ThreadCollectives, run_ranks

K = 3
UPDATES = range(1, 5)
HALF = {"a": "float16", "c": "float16"}


def micro_steps(update: int) -> range:
    return range(K * update, K * update + K)


def large_gradients(model: chainer.Link, rank: int, update: int) -> None:
    """Gives parameters the means of what the micro-batches of an update give them."""
    for name, param in model.namedparams():
        wide = np.float32 if param.dtype == np.float16 else param.dtype
        first, *others = (models.gradient(name, param, rank, s) for s in micro_steps(update))
        total = first.astype(wide)
        for other in others:
            total = total + other
        param.grad = np.asarray(total / K).astype(param.dtype)


def add_hooks(optimizer: Any) -> None:
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.01))
    optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(2.0))
    optimizer.add_hook(chainer.optimizer_hooks.GradientLARS())


@pytest.mark.parametrize("make", [chainer.optimizers.SMORMS3, chainer.optimizers.Adam])
@pytest.mark.parametrize("gradients", ["sharded", "replicated"])
@pytest.mark.parametrize("dtypes", [None, HALF])
def test_an_update_of_micro_batches_is_chainers_of_their_mean(
    make: Any, gradients: str, dtypes: Any
) -> None:
    theirs = models.Model(dtypes=dtypes)
    plain = make().setup(theirs)
    add_hooks(plain)
    for update in UPDATES:
        large_gradients(theirs, 0, update)
        with np.errstate(all="ignore"):
            plain.update()

    def run(collectives: ThreadCollectives) -> None:
        ours = models.Model(dtypes=dtypes)
        optimizer = create_multi_node_optimizer(
            make(), collectives, gradients=gradients, accumulate=K, step_after_broadcast=True
        ).setup(ours)
        add_hooks(optimizer)
        for update in UPDATES:
            # Alike on both ranks, whose mean is that of one, then.
            for step in micro_steps(update):
                models.train(optimizer, 0, [step])
        assert optimizer.t == len(UPDATES)
        models.assert_same_bits(ours, theirs)

    run_ranks(2, run)


def test_a_block_adds_its_updates_to_the_next_one_and_sends_nothing() -> None:
    def body(optimizer: Any, rank: int) -> Any:
        for update in UPDATES:
            if not block:
                large_gradients(optimizer.target, rank, update)
                optimizer.update()
                continue
            *others, last = micro_steps(update)
            sent = dict(optimizer.collectives.bytes_sent)
            with optimizer.accumulate():
                for step in others:
                    models.set_gradients(optimizer.target, rank, step)
                    t = optimizer.t
                    optimizer.update()
                    assert optimizer.t == t
            assert optimizer.collectives.bytes_sent == sent
            models.set_gradients(optimizer.target, rank, last)
            optimizer.update()
        return optimizer.target

    for world_size in (1, 3):
        block = True
        ours = models.on_ranks(world_size, body)
        block = False
        for mine, expected in zip(ours, models.on_ranks(world_size, body), strict=True):
            models.assert_same_bits(mine, expected)


def loss_of(model: Any, x: Any, t: Any) -> chainer.Variable:
    return F.mean_squared_error(model(x), t)


def test_losses_of_micro_batches_are_the_mean_over_the_large_batch() -> None:
    rng = np.random.RandomState(0)
    x, t = rng.randn(12, 5), rng.randn(12, 2)

    def train(collectives: ThreadCollectives, parts: int) -> Any:
        np.random.seed(0)
        with chainer.using_config("dtype", np.float64):
            model = L.Linear(5, 2)
        optimizer = create_multi_node_optimizer(
            chainer.optimizers.MomentumSGD(0.1), collectives, accumulate=parts
        ).setup(model)
        optimizer.set_loss_scale(16)
        optimizer.lr = 0.1
        for _ in range(4):
            for rows in np.split(np.arange(12), parts):
                optimizer.update(loss_of, model, x[rows], t[rows])
        return model.W.array

    for parts in (2, 4):
        (small,), (large,) = (run_ranks(1, lambda c, n=n: train(c, n)) for n in (parts, 1))
        np.testing.assert_allclose(small, large, rtol=1e-12)


def test_a_gradient_that_overflows_in_one_micro_batch_leaves_the_update_out() -> None:
    def body(optimizer: Any, rank: int) -> None:
        optimizer.loss_scaling()
        optimizer.update()
        optimizer.update()
        before = {n: models.bits(p.array) for n, p in optimizer.target.namedparams()}
        for spoilt in (True, False):
            models.set_gradients(optimizer.target, rank, 1)
            if spoilt and rank == 1:
                optimizer.target.g.grad[3] = np.inf
            optimizer.update()
        assert before == {n: models.bits(p.array) for n, p in optimizer.target.namedparams()}

    with pytest.warns(UserWarning, match="/g is not finite: no step is made"):
        models.on_ranks(2, body, accumulate=2)


def one(optimizer: Any, rank: int = 0) -> None:
    models.set_gradients(optimizer.target, rank, 1)
    optimizer.update()


def test_what_would_lose_gradients_that_are_held_is_refused(tmp_path: Path) -> None:
    def body(optimizer: Any, rank: int) -> None:
        one(optimizer)
        held = "comes after 1 micro-batches of an update that is not made yet"
        with pytest.raises(RuntimeError, match=rf"setup\(\) {held}"):
            optimizer.setup(models.Model())
        with pytest.raises(RuntimeError, match=held):
            smorms3_dist.save_checkpoint(tmp_path, optimizer)
        optimizer.set_loss_scale(8)
        models.set_gradients(optimizer.target, 0, 1)
        with pytest.raises(RuntimeError, match="has become 8, with gradients of 1 micro-batches"):
            optimizer.update()

    models.on_ranks(1, body, accumulate=2)


def test_ranks_that_take_different_numbers_are_named() -> None:
    def body(optimizer: Any, rank: int) -> None:
        for _ in range(2):
            with optimizer.accumulate():
                for _ in range(rank):
                    one(optimizer, rank)
            one(optimizer, rank)

    with pytest.raises(RuntimeError, match="micro-batches of the update: 1 on rank 0, 2 on rank 1"):
        models.on_ranks(2, body)


@pytest.mark.parametrize("number", [0, -1, 2.0, True, "2"])
def test_what_is_no_number_of_micro_batches_is_refused(number: Any) -> None:
    with pytest.raises(ValueError, match="accumulate must be 1 or more"):
        run_ranks(
            1,
            lambda c: create_multi_node_optimizer(
                chainer.optimizers.SMORMS3(), c, accumulate=number
            ),
        )


class Net(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l = L.Linear(3, 2, initialW=np.eye(2, 3, dtype="f"))

    def __call__(self, x: Any) -> chainer.Variable:
        loss = F.mean(self.l(x) ** 2)
        chainer.report({"loss": loss, "first": float(x[0, 0])}, self)
        return loss


def trainer_of(
    collectives: Any, directory: Path, batch: int, accumulate: int, until: int
) -> training.Trainer:
    data = TupleDataset(np.arange(60, dtype="f").reshape(20, 3) / 60)
    optimizer = create_multi_node_optimizer(
        chainer.optimizers.SGD(0.5), collectives, accumulate=accumulate
    ).setup(Net())
    iterator = chainer.iterators.SerialIterator(data, batch, shuffle=False)
    updater = training.StandardUpdater(iterator, optimizer)
    trainer = training.Trainer(updater, (until, "epoch"), out=str(directory))
    trainer.extend(extensions.LogReport(trigger=(1, "iteration")))
    checkpoint = smorms3_dist.ShardedCheckpoint(directory / "ck", every=(1, "epoch"))
    trainer.extend(checkpoint)
    checkpoint.maybe_load(trainer)
    trainer.run()
    return trainer


def values(trainer: training.Trainer, key: str) -> Iterable[float]:
    return [entry[key] for entry in trainer.get_extension("LogReport").log]


def test_an_iteration_of_a_trainer_is_one_update(tmp_path: Path) -> None:
    """Of 2 micro-batches of 3 images, or one batch of 6; 20 images are no multiple of either."""

    def run(name: str, *arguments: Any) -> training.Trainer:
        return run_ranks(1, lambda c: trainer_of(c, tmp_path / name, *arguments))[0]

    large = run("large", 6, 1, 4)
    small = run("small", 3, 2, 4)
    run("parts", 3, 2, 2)
    resumed = run("parts", 3, 2, 4)
    for trainer in (small, resumed):
        assert trainer.updater.iteration == large.updater.iteration == 14
        assert trainer.updater.epoch_detail == large.updater.epoch_detail
        optimizer, theirs = (t.updater.get_optimizer("main") for t in (trainer, large))
        assert (optimizer.t, optimizer.epoch) == (theirs.t, theirs.epoch)
        ours, expected = optimizer.target, theirs.target
        np.testing.assert_allclose(ours.l.W.array, expected.l.W.array, rtol=1e-5)
        np.testing.assert_allclose(
            values(trainer, "main/loss"), values(large, "main/loss"), rtol=1e-5
        )
    models.assert_same_bits(
        small.updater.get_optimizer("main").target, resumed.updater.get_optimizer("main").target
    )


def test_optimizers_of_one_updater_take_as_many_micro_batches() -> None:
    def run(collectives: ThreadCollectives) -> None:
        both = {
            name: create_multi_node_optimizer(
                chainer.optimizers.SGD(), collectives, accumulate=number
            ).setup(Net())
            for name, number in (("main", 1), ("other", 3))
        }
        iterator = chainer.iterators.SerialIterator([(np.ones(3, "f"),)] * 4, 2)
        updater = training.StandardUpdater(iterator, both, loss_func=lambda *_: None)
        training.Trainer(updater, (1, "epoch")).run()

    with pytest.raises(RuntimeError, match="1 for 'main', 3 for 'other'"):
        run_ranks(1, run)

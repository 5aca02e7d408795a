"""Several optimizers side by side, models that communicate themselves, and bare updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from smorms3_dist import create_multi_node_optimizer

import chainer
import chainer.functions as F
import chainer.links as L
import models
import mpirun
import numpy as np
import pytest
from chainer import training
from rank_threads import ThreadCollectives, run_ranks

MODES = ["sharded", "replicated"]


def trained(world_size: int) -> list[dict[str, Any]]:
    return mpirun.run_worlds(3, "several.py")[world_size]


@pytest.mark.mpi
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batch_normalization_over_ranks_and_two_optimizers_over_one_communicator(
    world_size: int,
) -> None:
    reports = trained(world_size)
    for values in reports:
        for result in [*values["two"], *values["normalization"].values()]:
            assert result["relative"] <= 1e-6
            assert result["same_bits"] or world_size > 2
        if world_size <= 2:
            assert all(values["normalization"][mode]["same_averages"] for mode in MODES)
    for index, count in enumerate((9, 14)):
        results = [values["two"][index] for values in reports]
        # Of 15 iterations, two thirds and all; and a broadcast each.
        assert {tuple(result["counts"]) for result in results} == {(count, count)}
        held = sum(result["state_bytes"] for result in results)
        assert held == results[0]["expected_state_bytes"]
    for values in reports if world_size > 1 else ():
        assert "optimizer: number " in values["told"], "updated in another order"


def test_two_optimizers_of_one_model_each_update_their_own_part() -> None:
    """The parts have different optimizers; each is the target of its own."""

    def train(wrap: Callable[[Any], Any], rank: int, steps: range) -> chainer.Link:
        model = chainer.Chain(body=models.Model(seed=1), head=models.Model(seed=2))
        parts = [
            wrap(chainer.optimizers.SMORMS3()).setup(model.body),
            wrap(chainer.optimizers.MomentumSGD()).setup(model.head),
        ]
        for step in steps:
            models.set_gradients(model, rank, step)
            for optimizer in parts if step % 2 else parts[::-1]:
                optimizer.update()
        return model

    theirs = train(lambda actual: actual, 0, range(1, 6))

    def run(collectives: ThreadCollectives) -> chainer.Link:
        # The same gradients on all ranks: two of them have an exact mean.
        return train(lambda actual: create_multi_node_optimizer(actual, collectives), 0, range(6))

    for world_size in (1, 2):
        for ours in run_ranks(world_size, run):
            models.assert_same_bits(ours, theirs)


class Perceptron(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        rng = np.random.RandomState(2)
        with self.init_scope():
            self.l1 = L.Linear(6, 29, initialW=rng.standard_normal((29, 6)).astype("f") * 0.3)
            self.l2 = L.Linear(29, 1, initialW=rng.standard_normal((1, 29)).astype("f") * 0.3)

    def forward(self, x: Any) -> chainer.Variable:
        return self.l2(F.leaky_relu(self.l1(x)))


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_parallel_updater_trains_as_with_chainers_and_all_ranks_and_copies_alike(
    world_size: int, gradients: str
) -> None:
    """Two copies of the model compute gradients; the main optimizer makes a bare update."""

    def train(wrap: Callable[[Any], Any], rank: int) -> tuple[Any, list[chainer.Link]]:
        model = L.Classifier(Perceptron(), lossfun=F.sigmoid_cross_entropy)
        model.compute_accuracy = False
        optimizer = wrap(chainer.optimizers.SMORMS3(lr=0.02)).setup(model)
        optimizer.add_hook(chainer.optimizer_hooks.GradientHardClipping(-0.05, 0.05))
        rng = np.random.RandomState([3, rank])
        data = [(x, np.array([x.sum() > 0], "i")) for x in rng.standard_normal((24, 6)).astype("f")]
        iterator = chainer.iterators.SerialIterator(data, 6, shuffle=False)
        updater = training.updaters.ParallelUpdater(
            iterator, optimizer, devices={"main": "@numpy", "second": "@numpy"}
        )
        for _ in range(9):
            updater.update()
        return optimizer, list(updater._models.values())

    def run(collectives: ThreadCollectives) -> list[chainer.Link]:
        def wrap(actual: Any) -> Any:
            return create_multi_node_optimizer(
                actual, collectives, gradients=gradients, step_after_broadcast=True
            )

        optimizer, links = train(wrap, collectives.rank)
        assert (optimizer.t, optimizer.epoch) == (9, 2)
        return links

    links = [link for copies in run_ranks(world_size, run) for link in copies]
    assert len(links) == 2 * world_size
    models.assert_alike(links)
    assert np.any(links[0].predictor.l1.W.array != Perceptron().l1.W.array)
    if world_size == 1:
        reference, _ = train(lambda actual: actual, 0)
        models.assert_same_bits(links[0], reference.target)

"""Several optimizers side by side, models that communicate themselves, and bare updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
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


def stepping_at_once(collectives: ThreadCollectives, gradients: str) -> Callable[[Any], Any]:
    """Wraps optimizers so that they make as many steps as Chainer's."""

    def wrap(actual: Any) -> Any:
        return create_multi_node_optimizer(
            actual, collectives, gradients=gradients, step_after_broadcast=True
        )

    return wrap


@pytest.mark.mpi
@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [1, 2])
def test_multi_node_batch_normalization_in_the_model_equals_chainermn_bit_for_bit(
    world_size: int, gradients: str
) -> None:
    for values in trained(world_size):
        result = values["normalization"][gradients]
        assert result["same_bits"], result["relative"]
        assert result["same_averages"]


@pytest.mark.mpi
@pytest.mark.parametrize("world_size", [1, 2])
def test_two_optimizers_over_one_communicator_equal_chainermns_bit_for_bit(
    world_size: int,
) -> None:
    for values in trained(world_size):
        for result in values["two"]:
            assert result["same_bits"], result["relative"]


@pytest.mark.mpi
def test_two_optimizers_over_one_communicator_of_three_ranks_equal_chainermns_to_1e_6() -> None:
    for values in trained(3):
        for result in values["two"]:
            assert result["relative"] <= 1e-6


@pytest.mark.mpi
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_two_optimizers_count_and_shard_each_for_itself(world_size: int) -> None:
    reports = trained(world_size)
    for index in (0, 1):
        results = [values["two"][index] for values in reports]
        # Of 15 iterations, two thirds and all; and a broadcast each.
        assert {tuple(result["counts"]) for result in results} == {((9, 9), (14, 14))[index]}
        held = sum(result["state_bytes"] for result in results)
        assert held == results[0]["expected_state_bytes"]


class Generator(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        rng = np.random.RandomState(1)
        with self.init_scope():
            self.l1 = L.Linear(4, 37, initialW=rng.standard_normal((37, 4)).astype("f") * 0.3)
            self.l2 = L.Linear(37, 6, initialW=rng.standard_normal((6, 37)).astype("f") * 0.3)

    def forward(self, z: np.ndarray) -> chainer.Variable:
        return self.l2(F.tanh(self.l1(z)))


class Discriminator(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        rng = np.random.RandomState(2)
        with self.init_scope():
            self.l1 = L.Linear(6, 29, initialW=rng.standard_normal((29, 6)).astype("f") * 0.3)
            self.l2 = L.Linear(29, 1, initialW=rng.standard_normal((1, 29)).astype("f") * 0.3)

    def forward(self, x: Any) -> chainer.Variable:
        return self.l2(F.leaky_relu(self.l1(x)))


class GanUpdater(training.updaters.StandardUpdater):
    """Updates the discriminator and then the generator, from one forward pass of both.

    The generator's backward pass leaves gradients in the discriminator too, to be cleared before
    its next update.
    """

    def __init__(self, iterator: Any, optimizers: dict[str, Any], rank: int) -> None:
        super().__init__(iterator, optimizers)
        self.noise = np.random.RandomState([5, rank])

    def update_core(self) -> None:
        generator, discriminator = self.get_optimizer("generator"), self.get_optimizer("main")
        real = self.converter(self.get_iterator("main").next())
        z = self.noise.standard_normal((len(real), 4)).astype("f")
        fake = generator.target(z)
        on_real, on_fake = discriminator.target(real), discriminator.target(fake)
        discriminator.update(lambda: F.mean(F.softplus(-on_real)) + F.mean(F.softplus(on_fake)))
        generator.update(lambda: F.mean(F.softplus(-on_fake)))


def train_gan(wrap: Callable[[Any], Any], rank: int, out: Path, passes: int) -> dict[str, Any]:
    optimizers = {
        "main": wrap(chainer.optimizers.SMORMS3(lr=0.01)).setup(Discriminator()),
        "generator": wrap(chainer.optimizers.Adam(alpha=0.01)).setup(Generator()),
    }
    optimizers["main"].add_hook(chainer.optimizer_hooks.WeightDecay(0.001))
    data = np.random.RandomState([9, rank]).standard_normal((12, 6)).astype("f")
    iterator = chainer.iterators.SerialIterator(data, 4, shuffle=False)
    updater = GanUpdater(iterator, optimizers, rank)
    trainer = training.Trainer(updater, (passes, "iteration"), out=str(out))
    trainer.run()
    return optimizers


@pytest.mark.parametrize("gradients", MODES)
def test_generator_and_discriminator_on_one_rank_equal_chainers(
    gradients: str, tmp_path: Path
) -> None:
    theirs = train_gan(lambda actual: actual, 0, tmp_path / "chainer", 11)

    def run(collectives: ThreadCollectives) -> Any:
        wrap = stepping_at_once(collectives, gradients)
        return train_gan(wrap, 0, tmp_path / "ours", 11)

    (ours,) = run_ranks(1, run)
    for name, optimizer in ours.items():
        assert optimizer.t == theirs[name].t == 11
        models.assert_same_bits(optimizer.target, theirs[name].target)


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


DEVICES = {"main": "@numpy", "second": "@numpy"}


def train_in_parallel(
    wrap: Callable[[Any], Any], rank: int, clip: bool, passes: int
) -> tuple[Any, training.updaters.ParallelUpdater]:
    """Two copies of the model compute gradients; the main optimizer makes a bare update."""
    model = L.Classifier(Discriminator(), lossfun=F.sigmoid_cross_entropy)
    model.compute_accuracy = False
    optimizer = wrap(chainer.optimizers.SMORMS3(lr=0.02)).setup(model)
    if clip:
        optimizer.add_hook(chainer.optimizer_hooks.GradientHardClipping(-0.05, 0.05))
    rng = np.random.RandomState([3, rank])
    data = [(x, np.array([x.sum() > 0], "i")) for x in rng.standard_normal((24, 6)).astype("f")]
    iterator = chainer.iterators.SerialIterator(data, 6, shuffle=False)
    updater = training.updaters.ParallelUpdater(iterator, optimizer, devices=DEVICES)
    for _ in range(passes):
        updater.update()
    return optimizer, updater


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("clip", [False, True])
def test_the_parallel_updater_on_one_rank_trains_as_with_chainers(
    clip: bool, gradients: str
) -> None:
    reference, _ = train_in_parallel(lambda actual: actual, 0, clip, 9)

    def run(collectives: ThreadCollectives) -> None:
        wrap = stepping_at_once(collectives, gradients)
        optimizer, updater = train_in_parallel(wrap, 0, clip, 9)
        assert (optimizer.t, optimizer.epoch) == (reference.t, reference.epoch) == (9, 2)
        for model in updater._models.values():
            models.assert_same_bits(model, reference.target)

    run_ranks(1, run)


@pytest.mark.parametrize("gradients", MODES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_parallel_updater_gives_every_rank_and_every_copy_the_same_model(
    world_size: int, gradients: str
) -> None:
    def run(collectives: ThreadCollectives) -> list[chainer.Link]:
        def wrap(actual: Any) -> Any:
            return create_multi_node_optimizer(actual, collectives, gradients=gradients)

        optimizer, updater = train_in_parallel(wrap, collectives.rank, True, 9)
        assert optimizer.t == 8
        return list(updater._models.values())

    links = [link for copies in run_ranks(world_size, run) for link in copies]
    assert len(links) == 2 * world_size
    for link in links[1:]:
        models.assert_same_bits(link, links[0])
    assert np.any(links[0].predictor.l1.W.array != Discriminator().l1.W.array)

"""Trainings whose checkpoints are converted: Trainers with all that they can have, and a loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from smorms3_dist import ShardedCheckpoint, create_multi_node_optimizer, save_checkpoint
from smorms3_dist.cli import main

import chainer
import chainer.functions as F
import chainer.links as L
import models
import numpy as np
import pytest
from chainer import serializers
from chainer.optimizers import SMORMS3
from chainer.training import Trainer, extensions
from chainer.training.trigger import get_trigger
from chainer.training.updaters import StandardUpdater
from rank_threads import ThreadCollectives, run_ranks

ITEMS = 24


class Net(chainer.Chain):
    """Its first weight is made when it first sees data; beside parameters it has statistics."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        rng = np.random.RandomState(seed)

        def initializer(array: np.ndarray) -> None:
            array[...] = rng.standard_normal(array.shape) * 0.3

        with self.init_scope():
            self.l1 = L.Linear(None, 11, initialW=initializer)
            self.norm = L.BatchNormalization(11)
            self.l2 = L.Linear(11, 3, initialW=initializer)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> chainer.Variable:
        return F.softmax_cross_entropy(self.l2(F.tanh(self.norm(self.l1(x)))), y)


class Tied(chainer.Chain):
    """A parameter to which two paths lead."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.inner = models.Model({"a": (3, 5), "g": (50, 7)})
            self.twin = models.Model({"g": (50, 7)})
            self.twin.g = self.inner.g


def trainer_of(optimizer: Any, out: Path, shuffle: bool = True) -> Trainer:
    """A Trainer; all have the same data."""
    rng = np.random.RandomState(5)
    xs, ys = rng.standard_normal((ITEMS, 7)).astype("f"), rng.randint(0, 3, ITEMS).astype("i")
    data = chainer.datasets.TupleDataset(xs, ys)
    iterator = chainer.iterators.SerialIterator(data, 4, shuffle=shuffle)
    trainer = Trainer(StandardUpdater(iterator, optimizer), (10, "epoch"), out=str(out))
    trainer.extend(extensions.LogReport(trigger=(1, "iteration"), filename=None))
    trainer.extend(extensions.observe_lr(), trigger=(1, "iteration"))
    return trainer


def sharded_trainer(
    collectives: ThreadCollectives, directory: Path, seed: int = 0, shuffle: bool = True
) -> tuple[Trainer, ShardedCheckpoint]:
    optimizer = create_multi_node_optimizer(SMORMS3(lr=0.01), collectives).setup(Net(seed))
    trainer = trainer_of(optimizer, directory / "out", shuffle)
    checkpoint = ShardedCheckpoint(directory, every=(1, "iteration"), asynchronous=False)
    trainer.extend(checkpoint)
    return trainer, checkpoint


def chainer_trainer(out: Path, seed: int = 0, shuffle: bool = True) -> Trainer:
    return trainer_of(SMORMS3(lr=0.01).setup(Net(seed)), out, shuffle)


def go_on(trainer: Trainer, iterations: int) -> None:
    """Trains until so many iterations have been made."""
    trainer.stop_trigger = get_trigger((iterations, "iteration"))
    trainer.run()


def save_trainer(directory: Path, world_size: int, iterations: int = 4) -> list[Any]:
    """Saves a Trainer's iterations."""

    def run(collectives: ThreadCollectives) -> Any:
        trainer, _ = sharded_trainer(collectives, directory)
        go_on(trainer, iterations)
        return trainer

    return run_ranks(world_size, run)


def command(*arguments: object) -> int:
    return main(["checkpoint", *map(str, arguments)])


def succeed(*arguments: object) -> None:
    assert command(*arguments) == 0


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs a command that has to fail; returns its one line of complaint."""
    capsys.readouterr()
    assert command(*arguments) == 1
    output, error = capsys.readouterr()
    assert output == ""
    assert error.startswith("smorms3-dist checkpoint: error: ")
    assert error.count("\n") == 1, error
    return error


def save_large(directory: Path, world_size: int = 2) -> int:
    """Saves a model of some 60 MB with its states; returns their bytes."""
    shapes = {"a": (1000, 2500), "b": (1_250_000,)}

    def run(collectives: ThreadCollectives) -> None:
        optimizer = create_multi_node_optimizer(SMORMS3(), collectives).setup(models.Model(shapes))
        optimizer.update()
        for param in optimizer.target.params():
            param.grad = param.array.copy()
        optimizer.update()
        save_checkpoint(directory, optimizer)

    run_ranks(world_size, run)
    return 4 * 4 * sum(int(np.prod(shape)) for shape in shapes.values())


class NotStarted:
    """A Trainer that has not run: Chainer cannot save the time that it has taken."""

    def __init__(self, updater: Any) -> None:
        self.updater = updater

    def serialize(self, serializer: Any) -> None:
        self.updater.serialize(serializer["updater"])


def save_chainer(
    path: Path,
    model: chainer.Link,
    optimizer: Any,
    configure: Callable[[Any], None] = lambda optimizer: None,
    steps: range = range(1, 4),
) -> Any:
    """Trains by Chainer without a Trainer's loop, and saves a snapshot of a Trainer."""
    optimizer.setup(model)
    configure(optimizer)
    for step in steps:
        models.set_gradients(model, 0, step)
        with np.errstate(all="ignore"):
            optimizer.update()
    updater = chainer.training.updaters.StandardUpdater(
        chainer.iterators.SerialIterator(list(range(8)), 2), optimizer
    )
    with open(path, "wb") as file:
        serializers.save_npz(file, NotStarted(updater))
    return optimizer

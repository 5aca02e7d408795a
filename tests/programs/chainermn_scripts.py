"""Scripts of every kind that ChainerMN is used for, which know nothing of smorms3_dist.

    chainermn_scripts.py DIRECTORY

On four ranks: each half of them runs half of the scripts, then all run one together. Each leaves
in ``KIND.RANK.npz`` what its optimizers are, and the parameters that they end with.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
from chainer.training import StandardUpdater, Trainer, extensions
from chainermn import create_multi_node_optimizer
from chainermn.links import MultiNodeBatchNormalization

directory = Path(sys.argv[1])
chainer.disable_experimental_feature_warning = True


def perceptron(*sizes: int | None) -> chainer.Sequential:
    layers: list[Any] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [L.Linear(n_in, n_out), F.relu]
    return chainer.Sequential(*layers[:-1])


def labelled(count: int, *shape: int) -> chainer.datasets.TupleDataset:
    rng = np.random.RandomState(7)
    x = rng.standard_normal((count, *shape)).astype("f")
    return chainer.datasets.TupleDataset(x, rng.randint(0, 3, count).astype("i"))


def scattered(comm: Any, data: Any) -> Any:
    data = chainermn.scatter_dataset(data if comm.rank == 0 else None, comm, shuffle=True, seed=5)
    return chainer.iterators.SerialIterator(data, 3)


def trainer_of(updater: Any, iterations: int = 9) -> Trainer:
    return Trainer(updater, (iterations, "iteration"), out=str(directory))


def classifier(comm: Any) -> list[Any]:
    """With lazily made layers, an evaluator of all ranks, and extensions on rank 0."""
    model = L.Classifier(perceptron(None, 11, 3))
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.SMORMS3(lr=0.01), comm)
    optimizer.setup(model)
    trainer = trainer_of(StandardUpdater(scattered(comm, labelled(25, 5)), optimizer))
    test = chainer.iterators.SerialIterator(labelled(7, 5), 2, repeat=False, shuffle=False)
    evaluator = chainermn.create_multi_node_evaluator(extensions.Evaluator(test, model), comm)
    trainer.extend(evaluator, trigger=(4, "iteration"))
    trainer.extend(extensions.ExponentialShift("lr", 0.7), trigger=(2, "iteration"))
    # It needs a patch, and all ranks.
    trainer.extend(chainermn.extensions.ObservationAggregator(comm, "main/loss", "loss"))
    if comm.rank == 0:
        trainer.extend(extensions.LogReport(trigger=(3, "iteration")))
        trainer.extend(extensions.snapshot(filename="snapshot"), trigger=(9, "iteration"))
    trainer.run()
    return [optimizer]


class AdversarialUpdater(StandardUpdater):
    def update_core(self) -> None:
        optimizers = self.get_all_optimizers()
        x = self.converter(self.get_iterator("main").next(), self.device)
        made = optimizers["gen"].target(np.random.uniform(-1, 1, (len(x), 2)).astype("f"))
        real, fake = (optimizers["dis"].target(each) for each in (x, made))
        optimizers["dis"].update(lambda: F.sum(F.softplus(-real)) + F.sum(F.softplus(fake)))
        optimizers["gen"].update(lambda: F.sum(F.softplus(-fake)))


def adversarial(comm: Any) -> list[Any]:
    """Two optimizers with hooks, over communicators of their own."""
    optimizers = {}
    for name, sizes, over in (
        ("gen", (2, 7, 4), comm),
        ("dis", (4, 9, 1), comm.split(0, comm.rank)),
    ):
        optimizer = create_multi_node_optimizer(chainer.optimizers.Adam(0.01, beta1=0.5), over)
        optimizer.setup(perceptron(*sizes))
        optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.001), "decay")
        optimizers[name] = optimizer
    data = [x for x, _ in labelled(19, 4)]
    trainer_of(AdversarialUpdater(scattered(comm, data), optimizers)).run()
    return list(optimizers.values())


class Translator(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.embed_x, self.embed_y = L.EmbedID(6, 5), L.EmbedID(7, 5)
            self.encoder, self.decoder = L.NStepLSTM(2, 5, 5, 0.1), L.NStepLSTM(2, 5, 5, 0.1)
            self.out = L.Linear(5, 7)

    def __call__(self, xs: list[Any], ys: list[Any]) -> chainer.Variable:
        h, c, _ = self.encoder(None, None, [self.embed_x(x) for x in xs])
        _, _, outputs = self.decoder(h, c, [self.embed_y(y[:-1]) for y in ys])
        expected = np.concatenate([y[1:] for y in ys])
        return F.softmax_cross_entropy(self.out(F.concat(outputs, axis=0)), expected)


def sequences(comm: Any) -> list[Any]:
    """Words of sequences, of which a batch has some only."""
    rng = np.random.RandomState(3)
    pairs = [
        (rng.randint(0, 6, rng.randint(1, 5)).astype("i"), rng.randint(0, 7, 4).astype("i"))
        for _ in range(14)
    ]
    actual = chainer.optimizers.AdaGrad(0.05)
    actual.setup(Translator())
    optimizer = chainermn.optimizers.create_multi_node_optimizer(actual, comm)
    optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(0.5))

    def lists(batch: Any, _: Any) -> tuple[Any, ...]:
        return tuple(list(each) for each in zip(*batch, strict=True))

    trainer_of(StandardUpdater(scattered(comm, pairs), optimizer, converter=lists)).run()
    return [optimizer]


class ConvNet(chainer.Chain):
    def __init__(self, comm: Any) -> None:
        super().__init__()
        with self.init_scope():
            self.conv1 = L.Convolution2D(None, 5, 3, pad=1, nobias=True)
            self.norm1 = MultiNodeBatchNormalization(5, comm)
            self.conv2 = L.Convolution2D(5, 3, 3, nobias=True)
            self.norm2 = L.BatchNormalization(3)
            self.out = L.Linear(None, 3)

    def __call__(self, x: Any) -> chainer.Variable:
        h = F.dropout(F.relu(self.norm1(self.conv1(x))), 0.3)
        return self.out(F.max_pooling_2d(F.relu(self.norm2(self.conv2(h))), 2))


def images(comm: Any) -> list[Any]:
    """Convolutions with normalizations; batches come from rank 0, and are the same on all ranks."""
    optimizer = create_multi_node_optimizer(
        chainer.optimizers.MomentumSGD(0.05), communicator=comm, zero_fill=False
    )
    optimizer.setup(L.Classifier(ConvNet(comm)))
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(5e-4))
    mine = chainer.iterators.SerialIterator(labelled(13, 2, 7, 7), 4)
    batches = chainermn.iterators.create_multi_node_iterator(mine, comm)
    trainer = trainer_of(StandardUpdater(batches, optimizer))
    trainer.extend(extensions.LinearShift("lr", (0.05, 0.01), (2, 7)))
    checkpointer = chainermn.create_multi_node_checkpointer("images", comm, path=str(directory))
    trainer.extend(checkpointer, trigger=(4, "iteration"))
    trainer.run()
    return [optimizer]


def parts(comm: Any, width: int) -> chainer.Link:
    """The part of a model that a rank of two has: its ends, or what is between."""
    part = chainermn.MultiNodeChainList(comm=comm)
    if comm.rank == 0:
        part.add_link(perceptron(5, width), rank_in=None, rank_out=1)
        part.add_link(chainer.Sequential(F.identity), rank_in=1, rank_out=None)
        return L.Classifier(part)
    part.add_link(perceptron(width, 9, 3), rank_in=0, rank_out=0)
    return part


def train_parts(optimizer: Any, data: Any, iterations: int) -> None:
    iterator = chainer.iterators.SerialIterator(data, 3, shuffle=False)
    trainer_of(StandardUpdater(iterator, optimizer), iterations).run()


def model_parallel(comm: Any) -> list[Any]:
    """A part of the model on each rank, and Chainer's own optimizers."""
    optimizer = chainer.optimizers.Adam().setup(parts(comm, 6))
    data = labelled(11, 5)
    train_parts(
        optimizer, data if comm.rank == 0 else chainermn.datasets.create_empty_dataset(data), 5
    )
    return [optimizer]


def dual_parallel(comm: Any) -> list[Any]:
    """Parts of the model on two ranks, twice: each part has its communicator and its optimizer."""
    across, along = comm.split(comm.rank % 2, comm.rank), comm.split(comm.rank // 2, comm.rank)
    optimizer = chainermn.create_multi_node_optimizer(chainer.optimizers.RMSprop(), across)
    optimizer.setup(parts(along, 7))
    data = labelled(22, 5)
    if along.rank == 1:
        data = chainermn.datasets.create_empty_dataset(data)
    data = chainermn.scatter_dataset(data if across.rank == 0 else None, across)
    train_parts(optimizer, data, 8)
    return [optimizer]


def run(kind: Callable[[Any], list[Any]], comm: Any) -> None:
    np.random.seed(comm.rank)
    random.seed(0)
    kept: dict[str, Any] = {}
    for number, optimizer in enumerate(kind(comm)):
        kept[f"{number}/type"] = type(optimizer).__name__
        kept[f"{number}/t"] = optimizer.t
        for name, param in optimizer.target.namedparams():
            kept[f"{number}{name}"] = param.array
    np.savez(directory / f"{kind.__name__}.{comm.rank}.npz", **kept)


world = chainermn.create_communicator("naive")
half = world.split(world.rank // 2, world.rank)
for kind in ((model_parallel, classifier, adversarial), (sequences, images))[world.rank // 2]:
    run(kind, half)
run(dual_parallel, world)

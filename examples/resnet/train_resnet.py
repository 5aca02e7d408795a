"""Trains a small residual network on pictures of clothes, which other processes read and augment.

    smorms3-dist run -n 2 --checkpoint-dir ck --max-restarts 3 examples/resnet/train_resnet.py

Against a script for ChainerMN one line is different: the one that makes the multi-node optimizer.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import smorms3_dist  # mends Chainer for today's Python and NumPy, so it comes first

# isort: split
import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
from chainer import training
from chainer.training import extensions

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common
from mnist import data


class Block(chainer.Chain):
    """Two convolutions, and a way around them."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        convolution = functools.partial(
            L.Convolution2D, nobias=True, initialW=chainer.initializers.HeNormal()
        )
        with self.init_scope():
            self.conv1 = convolution(n_in, n_out, ksize=3, stride=stride, pad=1)
            self.bn1 = L.BatchNormalization(n_out)
            self.conv2 = convolution(n_out, n_out, ksize=3, pad=1)
            self.bn2 = L.BatchNormalization(n_out)
            if stride > 1:
                self.shortcut = convolution(n_in, n_out, ksize=1, stride=stride)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return F.relu(h + (self.shortcut(x) if hasattr(self, "shortcut") else x))


class ResNet(chainer.Chain):
    """A ResNet for small pictures: each of three stages has half the resolution of the last."""

    def __init__(self, width: int, n_class: int) -> None:
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(1, width, ksize=3, stride=2, pad=1, nobias=True)
            self.bn = L.BatchNormalization(width)
            self.stage1 = Block(width, width, stride=1)
            self.stage2 = Block(width, 2 * width, stride=2)
            self.stage3 = Block(2 * width, 4 * width, stride=2)
            self.fc = L.Linear(4 * width, n_class)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        h = F.relu(self.bn(self.conv(x)))
        h = self.stage3(self.stage2(self.stage1(h)))
        return self.fc(F.average(h, axis=(2, 3)))


class Images(chainer.dataset.DatasetMixin):
    """Images of shape (1, 28, 28) with their labels; where asked to, mirrored and moved at random.

    Item i + k * len(self) is variant k of item i. So workers need no random numbers of their own,
    which no two runs would share: a training can be repeated and resumed bit for bit.
    """

    def __init__(self, base: Any, augment: bool, seed: int) -> None:
        self._base, self._augment, self._seed = base, augment, seed

    def __len__(self) -> int:
        return len(self._base)

    def get_example(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        image, label = self._base[i % len(self)]
        image = image.reshape(1, 28, 28)
        if self._augment:
            random = np.random.RandomState([self._seed, i])
            top, left = random.randint(0, 5, 2)
            image = np.pad(image, [(0, 0), (2, 2), (2, 2)])[:, top : top + 28, left : left + 28]
            image = image[:, :, :: random.choice([-1, 1])]
        return np.ascontiguousarray(image), label


class VariantOrder:
    """An order sampler with which each pass over the images takes another variant of them."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, order: np.ndarray, position: int) -> np.ndarray:
        variant = order[0] // len(order) + 1
        random = np.random.RandomState([self._seed, variant])
        return variant * len(order) + random.permutation(len(order))


def main() -> None:
    args = parse_args()
    # Forked children of a process that uses MPI or a GPU are not safe.
    multiprocessing.set_start_method("forkserver")
    comm = chainermn.create_communicator(args.communicator)
    args.device = common.device_of(args, comm)

    # Rank 0 reads the data and gives every rank an equal part of it.
    train, test = data.load(args.dataset, args.data_dir) if comm.rank == 0 else (None, None)
    if comm.rank == 0 and args.subset:
        train, test = train[: args.subset], test[: args.subset]
    if comm.rank == 0:
        print(f"{args.dataset}: {len(train)} images to train, {len(test)} to validate", flush=True)
    train = chainermn.scatter_dataset(train, comm, shuffle=True, seed=args.seed)
    test = chainermn.scatter_dataset(test, comm)

    make = smorms3_dist.create_multi_node_optimizer
    trainer = fit(args, comm, train, test, make, args.out, args.checkpoint)
    if comm.rank == 0:
        print(f"validation accuracy: {common.accuracy(trainer):.2%}", flush=True)
    if args.compare:
        common.compare(args, comm, trainer, functools.partial(fit, args, comm, train, test))


def fit(
    args: argparse.Namespace,
    comm: Any,
    train: Any,
    test: Any,
    create_multi_node_optimizer: common.CreateOptimizer,
    out: str,
    checkpoint: Path | None = None,
) -> training.Trainer:
    """Trains a fresh model, which is the same for the same seed, and returns its trainer."""
    np.random.seed(args.seed + comm.rank)
    model = L.Classifier(ResNet(args.width, 10))
    model.to_device(args.device)

    # The line that is not ChainerMN's: there, it is chainermn.create_multi_node_optimizer.
    optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(lr=args.lr), comm)
    optimizer.setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(args.decay))

    train_iter = chainer.iterators.MultiprocessIterator(
        Images(train, True, args.seed),
        args.batchsize,
        n_processes=args.workers,
        order_sampler=VariantOrder(args.seed + comm.rank),
    )
    test_iter = chainer.iterators.SerialIterator(
        Images(test, False, args.seed), args.batchsize, repeat=False, shuffle=False
    )
    updater = training.StandardUpdater(train_iter, optimizer, device=args.device)
    trainer = training.Trainer(updater, (args.epoch, "epoch"), out=out)

    evaluator = extensions.Evaluator(test_iter, model, device=args.device)
    trainer.extend(chainermn.create_multi_node_evaluator(evaluator, comm))
    losses = ["main/loss", "validation/main/loss"]
    accuracies = ["main/accuracy", "validation/main/accuracy"]
    plots = {"loss.png": losses, "accuracy.png": accuracies}
    common.report(trainer, comm, [*losses, *accuracies], plots)
    if comm.rank == 0:
        # A snapshot is whole, in Chainer's own format; the other ranks take part in it.
        trainer.extend(extensions.snapshot(n_retains=1), trigger=(1, "epoch"))
    common.keep_checkpoints(trainer, checkpoint)

    trainer.run()
    return trainer


def parse_args() -> argparse.Namespace:
    parser = common.parser("Train a small ResNet with a sharded SMORMS3.", batchsize=64, epoch=5)
    parser.add_argument("--width", "-w", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--lr", type=float, default=0.005, help="SMORMS3's learning rate")
    parser.add_argument("--decay", type=float, default=0.0005, help="rate of the weight decay")
    parser.add_argument("--workers", type=int, default=1, help="of each rank, to read images")
    parser.add_argument("--dataset", choices=["mnist", "fashion-mnist"], default="fashion-mnist")
    parser.add_argument(
        "--data-dir",
        type=Path,
        help=f"with Fashion-MNIST's files; if not given, {data.DEBIAN_FASHION_MNIST} if it is "
        "there, or else a download by Chainer",
    )
    parser.add_argument("--subset", type=int, help="train and validate on so many images only")
    return parser.parse_args()


if __name__ == "__main__":
    main()

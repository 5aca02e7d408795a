"""Trains a multi-layer perceptron on images; every rank holds its share of the optimizer's state.

    mpirun -n 2 python -m smorms3_dist examples/mnist/train_mnist.py

Against a script for ChainerMN one line is different: the one that makes the multi-node optimizer.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import smorms3_dist  # mends Chainer for today's Python and NumPy, so it comes first

# isort: split
import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import data
import numpy as np
from chainer import training
from chainer.training import extensions

sys.path.append(str(Path(__file__).resolve().parents[1]))
import common


class MLP(chainer.Chain):
    def __init__(self, n_units: int, n_out: int) -> None:
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(784, n_units)
            self.l2 = L.Linear(n_units, n_units)
            self.l3 = L.Linear(n_units, n_out)

    def forward(self, x: chainer.Variable) -> chainer.Variable:
        h = F.relu(self.l1(x))
        h = F.relu(self.l2(h))
        return self.l3(h)


def main() -> None:
    args = parse_args()
    comm = chainermn.create_communicator(args.communicator)
    args.device = common.device_of(args, comm)

    # Rank 0 reads the data and gives every rank an equal part of it.
    train, test = data.load(args.dataset, args.data_dir) if comm.rank == 0 else (None, None)
    if comm.rank == 0:
        print(f"{args.dataset}: {len(train)} images to train, {len(test)} to validate", flush=True)
    train = chainermn.scatter_dataset(train, comm, shuffle=True, seed=args.seed)
    test = chainermn.scatter_dataset(test, comm)

    make = smorms3_dist.create_multi_node_optimizer
    trainer = fit(args, comm, train, test, make, args.out, args.checkpoint)
    optimizer = trainer.updater.get_optimizer("main")
    state = max(comm.gather_obj(optimizer.state_bytes()) or [0])
    if comm.rank == 0:
        # SMORMS3 keeps three arrays for each parameter, each of the parameter's own size.
        unsharded = sum(3 * param.array.nbytes for param in optimizer.target.params())
        print(f"validation accuracy: {common.accuracy(trainer):.2%}")
        print(f"optimizer state: {state:,} bytes on a rank, {unsharded:,} unsharded", flush=True)

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
    model = L.Classifier(MLP(args.unit, 10))
    model.to_device(args.device)

    # The line that is not ChainerMN's: there, it is chainermn.create_multi_node_optimizer.
    optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(lr=args.lr), comm)
    optimizer.setup(model)

    train_iter = chainer.iterators.SerialIterator(train, args.batchsize)
    test_iter = chainer.iterators.SerialIterator(test, args.batchsize, repeat=False, shuffle=False)
    updater = training.StandardUpdater(train_iter, optimizer, device=args.device)
    trainer = training.Trainer(updater, (args.epoch, "epoch"), out=out)

    evaluator = extensions.Evaluator(test_iter, model, device=args.device)
    trainer.extend(chainermn.create_multi_node_evaluator(evaluator, comm))

    losses = ["main/loss", "validation/main/loss"]
    accuracies = ["main/accuracy", "validation/main/accuracy"]
    common.report(trainer, comm, [*losses, *accuracies], plots={})
    common.keep_checkpoints(trainer, checkpoint)

    trainer.run()
    return trainer


def parse_args() -> argparse.Namespace:
    parser = common.parser(
        "Train a multi-layer perceptron with a sharded SMORMS3.", batchsize=50, epoch=10
    )
    parser.add_argument("--unit", "-u", type=int, default=256, help="units of a hidden layer")
    parser.add_argument("--lr", type=float, default=0.001, help="SMORMS3's learning rate")
    parser.add_argument("--dataset", choices=["mnist", "fashion-mnist"], default="mnist")
    parser.add_argument(
        "--data-dir",
        type=Path,
        help=f"with Fashion-MNIST's files; if not given, {data.DEBIAN_FASHION_MNIST} if it is "
        "there, or else a download by Chainer",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()

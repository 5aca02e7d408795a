"""Trains a multi-layer perceptron on images; every rank holds its share of the optimizer's state.

    mpirun -n 2 python -m smorms3_dist examples/mnist/train_mnist.py

Against a script for ChainerMN one line is different: the one that makes the multi-node optimizer.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

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
    args.device = f"@cupy:{smorms3_dist.use_gpu(comm)}" if args.gpu else "@numpy"

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
        print(f"validation accuracy: {accuracy(trainer):.2%}")
        print(f"optimizer state: {state:,} bytes on a rank, {unsharded:,} unsharded", flush=True)

    if args.compare:
        if comm.rank == 0:
            print("\nthe same training with ChainerMN's own optimizer:", flush=True)
        out = os.path.join(args.out, "chainermn")
        reference = fit(args, comm, train, test, chainermn.create_multi_node_optimizer, out)
        differences = comm.gather_obj(largest_difference(trainer, reference))
        if comm.rank == 0:
            seconds, reference_seconds = trainer.elapsed_time, reference.elapsed_time
            print(f"validation accuracy: {accuracy(reference):.2%}")
            print(f"time: {seconds:.1f} s, with ChainerMN's optimizer {reference_seconds:.1f} s")
            print(f"largest parameter difference on any rank: {max(differences)}", flush=True)


def fit(
    args: argparse.Namespace,
    comm: Any,
    train: Any,
    test: Any,
    create_multi_node_optimizer: Callable[[Any, Any], Any],
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

    # One rank reports for all.
    if comm.rank == 0:
        columns = ["epoch", "main/loss", "validation/main/loss"]
        columns += ["main/accuracy", "validation/main/accuracy", "elapsed_time"]
        trainer.extend(extensions.LogReport())
        if on_terminal():
            trainer.extend(extensions.PrintReport(columns))
            trainer.extend(extensions.ProgressBar(update_interval=10))
        else:
            trainer.extend(extensions.PrintReport(columns, out=PlainLines(sys.stdout)))

    if checkpoint is not None:
        saves = smorms3_dist.ShardedCheckpoint(checkpoint, keep_last=2, every=(1, "epoch"))
        trainer.extend(saves)
        step = saves.maybe_load(trainer)
        if step is not None and comm.rank == 0:
            print(f"going on from step {step}, on {comm.size} ranks", flush=True)

    trainer.run()
    return trainer


def accuracy(trainer: training.Trainer) -> float:
    """Returns the validation accuracy of the last epoch; only rank 0 has it."""
    return trainer.get_extension("LogReport").log[-1]["validation/main/accuracy"]


def largest_difference(trainer: training.Trainer, reference: training.Trainer) -> float:
    ours, theirs = (t.updater.get_optimizer("main").target.params() for t in (trainer, reference))
    return max(float(abs(a.array - b.array).max()) for a, b in zip(ours, theirs, strict=True))


def on_terminal() -> bool:
    """Tells whether a person is watching: mpirun gives ranks a terminal even if it has none."""
    launcher_output = f"/proc/{os.getppid()}/fd/1"
    if not sys.stdout.isatty():
        return False
    if "OMPI_COMM_WORLD_RANK" not in os.environ or not os.access(launcher_output, os.R_OK):
        return True
    return os.path.realpath(launcher_output).startswith(("/dev/pts/", "/dev/tty"))


class PlainLines:
    """An output for PrintReport without the escape code that it clears lines with."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        self._stream.write(text.replace("\033[J", ""))

    def flush(self) -> None:
        self._stream.flush()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a multi-layer perceptron with a sharded SMORMS3.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--batchsize", "-b", type=int, default=50, help="images a rank and step")
    parser.add_argument("--epoch", "-e", type=int, default=10, help="times through the data")
    parser.add_argument("--unit", "-u", type=int, default=256, help="units of a hidden layer")
    parser.add_argument("--lr", type=float, default=0.001, help="SMORMS3's learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of the parameters and the shuffling")
    parser.add_argument("--communicator", default="naive", help="ChainerMN's")
    parser.add_argument("--gpu", "-g", action="store_true", help="train on GPUs, one for each rank")
    parser.add_argument("--dataset", choices=["mnist", "fashion-mnist"], default="mnist")
    parser.add_argument(
        "--data-dir",
        type=Path,
        help=f"with Fashion-MNIST's files; if not given, {data.DEBIAN_FASHION_MNIST} if it is "
        "there, or else a download by Chainer",
    )
    parser.add_argument("--out", "-o", default="result", help="directory for the log")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        default=os.environ.get("SMORMS3_CHECKPOINT_DIR"),
        help="save each epoch there, and go on from what is there; if not given, that of "
        "smorms3-dist run --checkpoint-dir",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="train again with ChainerMN's optimizer and show how far the parameters differ",
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()

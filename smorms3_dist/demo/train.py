"""Trains a multi-layer perceptron on digits: one process by plain Chainer, ranks by ChainerMN.

Of several ranks each holds its share of the optimizer's state. Called by `smorms3-dist demo`, which
gives it the number of ranks, that of epochs, and the file of digits.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from smorms3_dist.demo import digits
from smorms3_dist.optimizer.factory import create_multi_node_optimizer

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import training
from chainer.datasets import TupleDataset
from chainer.iterators import SerialIterator
from chainer.training import extensions

_BATCHSIZE = 50


class MLP(chainer.Chain):
    """Two hidden layers of 256 units.

    Args:
        n_out: The number of classes.
    """

    def __init__(self, n_out: int) -> None:
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(784, 256)
            self.l2 = L.Linear(256, 256)
            self.l3 = L.Linear(256, n_out)

    def forward(self, x: Any) -> Any:
        """Gives the scores of the classes for each image."""
        return self.l3(F.relu(self.l2(F.relu(self.l1(x)))))


def main(ranks: int, epochs: int, path: str) -> None:
    """Trains, and prints how far it has come.

    Args:
        ranks: The number of ranks, of which this is one; with 1, nothing needs MPI.
        epochs: The number of times that all digits are trained on.
        path: The file of digits.
    """
    np.random.seed(0)
    optimizer = chainer.optimizers.SMORMS3()
    if ranks == 1:
        rank = 0
        train, test = (TupleDataset(*part) for part in digits.read(Path(path)))
    else:
        import chainermn

        comm = chainermn.create_communicator("naive")
        rank = comm.rank
        optimizer = create_multi_node_optimizer(optimizer, comm)
        whole = digits.read(Path(path)) if rank == 0 else (None, None)
        train, test = (
            chainermn.scatter_dataset(part and TupleDataset(*part), comm) for part in whole
        )

    model = L.Classifier(MLP(10))
    optimizer.setup(model)
    updater = training.StandardUpdater(SerialIterator(train, _BATCHSIZE), optimizer)
    trainer = training.Trainer(updater, (epochs, "epoch"), out=".")
    evaluator = extensions.Evaluator(
        SerialIterator(test, _BATCHSIZE, repeat=False, shuffle=False), model
    )
    if ranks > 1:
        evaluator = chainermn.create_multi_node_evaluator(evaluator, comm)
    trainer.extend(evaluator)
    if rank == 0:
        trainer.extend(extensions.LogReport(postprocess=_show, log_name=None))
        print(" epoch   loss  validation accuracy  seconds", flush=True)
    trainer.run()

    if ranks > 1 and rank == 0:
        # SMORMS3 keeps three arrays for each parameter, each of the parameter's own size.
        unsharded = sum(3 * param.array.nbytes for param in model.params())
        state = optimizer.state_bytes()
        print(f"optimizer state: {state:,} bytes on a rank, {unsharded:,} unsharded", flush=True)


def _show(entry: dict[str, Any]) -> None:
    print(
        f"{entry['epoch']:6}  {entry['main/loss']:5.3f}  "
        f"{entry['validation/main/accuracy']:19.2%}  {entry['elapsed_time']:7.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

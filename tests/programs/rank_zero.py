"""Trains with Trainers whose triggers go by the time, or by values of each rank's own.

rank_zero.py DIRECTORY
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import smorms3_dist

import chainer
import chainermn
import numpy as np
from chainer.iterators import SerialIterator
from chainer.training import Trainer, extensions, triggers
from chainer.training.updaters import StandardUpdater
from mpirun import report

comm = chainermn.create_communicator("naive")
directory = Path(sys.argv[1])


class Loss(chainer.Chain):
    """Takes other times on other ranks; its loss gets worse, after a while that differs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        with self.init_scope():
            self.W = chainer.Parameter(np.ones(3, "f"))

    def __call__(self, x: np.ndarray) -> chainer.Variable:
        self.calls += 1
        time.sleep(0.004 + 0.004 * comm.rank)
        chainer.report({"loss": abs(self.calls - 8 - 9 * comm.rank)}, self)
        return chainer.functions.sum(self.W * x)


def train(kind: str) -> int:
    optimizer = smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm)
    optimizer.setup(Loss())
    data = chainer.datasets.TupleDataset(np.ones((8, 3), "f"))
    stop: Any = (30, "iteration")
    if kind == "early":
        stop = smorms3_dist.extensions.early_stopping_trigger(
            (1, "iteration"), patience=2, max_trigger=stop
        )
    updater = StandardUpdater(SerialIterator(data, 2), optimizer)
    trainer = Trainer(updater, stop, str(directory / kind))
    clock = triggers.TimeTrigger(0.05)
    if kind == "checkpoint":
        trainer.extend(smorms3_dist.ShardedCheckpoint(directory / kind, every=clock))
    elif kind == "snapshot":
        trainer.extend(smorms3_dist.extensions.snapshot(), trigger=clock)
    elif kind == "plain" and comm.rank == 0:
        trainer.extend(extensions.snapshot(), trigger=clock)
    trainer.run()
    return int(trainer.updater.iteration)


report(
    comm.rank, kinds={kind: train(kind) for kind in ("checkpoint", "snapshot", "plain", "early")}
)

"""Trains with ChainerMN's iterators on MPI ranks, saves, and goes on.

iterators.py DIRECTORY save|resume
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import smorms3_dist

import chainer
import chainermn
import numpy as np
from chainer.iterators import SerialIterator
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater
from mpirun import report

warnings.filterwarnings("ignore", "chainermn.* is experimental", FutureWarning)
# ChainerMN's own, with a NumPy that still allows it.
warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
comm = chainermn.create_communicator("naive")
directory, what = Path(sys.argv[1]), sys.argv[2]
BREAK, LAST = 6, 11


def iterator_of(kind: str, seed: int) -> Any:
    np.random.seed(seed + comm.rank)
    data = [(np.full(3, i, "f"), np.int32(i % 2)) for i in range(16)]
    actual = SerialIterator(data, 4, shuffle="plain" not in kind)
    if "multi_node" in kind:
        return chainermn.iterators.create_multi_node_iterator(actual, comm)
    return chainermn.iterators.create_synchronized_iterator(actual, comm)


def train(kind: str, name: str, until: int, seed: int) -> dict[str, Any]:
    """Goes on from what is there; returns the batches, and where the iterator is."""
    iterator = iterator_of(kind, seed)
    link = chainer.links.Linear(3, 2, initialW=0.5)
    optimizer = smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm)
    optimizer.setup(link)
    batches: list[list[int]] = []

    def loss(x: np.ndarray, y: np.ndarray) -> chainer.Variable:
        batches.append([int(v) for v in x[:, 0]])
        return chainer.functions.sum(link(x))

    updater = StandardUpdater(iterator, optimizer, loss_func=loss)
    trainer = Trainer(updater, (until, "iteration"), str(directory / name))
    if "snapshot" in kind:
        trainer.extend(
            smorms3_dist.extensions.snapshot(autoload=True), trigger=(BREAK, "iteration")
        )
    else:
        checkpoint = smorms3_dist.ShardedCheckpoint(directory / name, every=(BREAK, "iteration"))
        trainer.extend(checkpoint)
        checkpoint.maybe_load(trainer)
    position = updater.epoch_detail
    trainer.run()
    return {"batches": batches, "started": position, "W": link.W.array.tolist()}


KINDS = ("multi_node", "multi_node plain", "synchronized", "multi_node plain snapshot")
facts: dict[str, Any] = {}
for kind in KINDS if what == "save" else KINDS[:3]:
    facts[kind] = {}
    if what == "save":
        facts[kind]["first"] = train(kind, f"{kind} parts", BREAK, 0)
        facts[kind]["whole"] = train(kind, f"{kind} whole", LAST, 0)
    facts[kind]["resumed"] = train(kind, f"{kind} parts", LAST, 50)
report(comm.rank, facts=facts)

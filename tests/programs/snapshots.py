"""Trains with a Trainer on MPI ranks, makes snapshots in one of several ways, and resumes.

    snapshots.py HOW DIRECTORY FIRST LAST

makes the updates up to FIRST, with a snapshot then, ends as if killed, and in a second life, with
new objects, loads what is there and goes on to LAST. With FIRST 0 it only loads; with LAST 0 it
only makes the snapshot.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from typing import Any

import smorms3_dist
from smorms3_dist.extensions import snapshot

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
from chainer.training import Trainer, extensions
from chainer.training.extensions import snapshot_writers
from chainer.training.updaters import StandardUpdater
from mpirun import report

how, directory, first, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
comm = chainermn.create_communicator("naive")


class Net(chainer.Chain):
    def __init__(self) -> None:
        super().__init__()
        weights = chainer.initializers.Constant(0.1)
        with self.init_scope():
            self.l1 = L.Linear(None, 13, initialW=weights)
            self.norm = L.BatchNormalization(13)
            self.l2 = L.Linear(None, 3, initialW=weights)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> chainer.Variable:
        return F.softmax_cross_entropy(self.l2(F.tanh(self.norm(self.l1(x)))), y)


def make() -> Trainer:
    # The same data everywhere and no shuffling: a snapshot of rank 0 has its own iterator alone.
    rng = np.random.RandomState(5)
    xs, ys = rng.standard_normal((40, 7)).astype("f"), rng.randint(0, 3, 40).astype("i")
    shuffled = how == "checkpointer"
    if shuffled:
        np.random.seed(comm.rank)
    iterator = chainer.iterators.SerialIterator(
        chainer.datasets.TupleDataset(xs, ys), 6, shuffle=shuffled
    )
    optimizer = smorms3_dist.create_multi_node_optimizer(
        chainer.optimizers.SMORMS3(lr=0.01), comm
    ).setup(Net())
    optimizer.loss_scaling(interval=2)
    trainer = Trainer(StandardUpdater(iterator, optimizer), (100, "iteration"), out=directory)
    # As if running: `run` would let the checkpointer delete its files at the end.
    trainer._start_at = 0.0
    return trainer


def update(trainer: Trainer, until: int, extension: Any) -> None:
    while trainer.updater.iteration < until:
        trainer.updater.update()
        if trainer.updater.iteration in (2, 4, first):
            extension(trainer)


def the_extension(trainer: Trainer) -> Any:
    if how == "checkpointer":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return chainermn.create_multi_node_checkpointer("run", comm, path=directory)
    if how in ("plain on rank 0", "multi_node_snapshot"):
        plain = extensions.snapshot()
        if how == "multi_node_snapshot":
            return chainermn.extensions.multi_node_snapshot(comm, plain, [])
        return plain if comm.rank == 0 else lambda trainer: None
    writer = snapshot_writers.ThreadWriter() if how == "thread" else None
    return snapshot(writer=writer, n_retains=1, autoload=True)


def restore(trainer: Trainer, extension: Any) -> None:
    if how == "checkpointer":
        extension.maybe_load(trainer, trainer.updater.get_optimizer("main"))
    else:
        extension.initialize(trainer)


trainer = make()
if first:
    extension = the_extension(trainer)
    if hasattr(extension, "initialize"):
        extension.initialize(trainer)
    update(trainer, first, extension)
    if how == "thread":
        extension.finalize()
if last and first:
    # Untouched by the snapshot, for comparison.
    update(trainer, last, lambda trainer: None)


def facts(trainer: Trainer) -> dict[str, Any]:
    optimizer = trainer.updater.get_optimizer("main")
    arrays = [param.array for _, param in sorted(optimizer.target.namedparams())]
    arrays += [optimizer.target.norm.avg_mean, optimizer.target.norm.avg_var]
    return {
        "t": optimizer.t,
        "epoch": optimizer.epoch,
        "iteration": trainer.updater.iteration,
        "scale": optimizer._loss_scale,
        "rules": [param.update_rule.t for param in optimizer.target.params()],
        "parameters": hashlib.sha256(b"".join(map(bytes, arrays))).hexdigest(),
    }


values = {"uninterrupted": facts(trainer) if first else None}
if last:
    second = make()
    restore(second, the_extension(second))
    values["resumed_at"] = second.updater.iteration
    update(second, last, lambda trainer: None)
    values["resumed"] = facts(second)
report(comm.rank, **values)

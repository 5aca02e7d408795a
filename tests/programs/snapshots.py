"""Trains with a Trainer on MPI ranks, makes snapshots in one of several ways, and resumes.

    snapshots.py HOW DIRECTORY      a snapshot that must not be made
    snapshots.py every DIRECTORY    all others, in worlds of 1, 2 and 3 ranks

Each makes the updates up to FIRST, with a snapshot then, ends as if killed, and in a second life,
with new objects, loads what is there and goes on to LAST. Then the extension's snapshots are loaded
in worlds of other sizes.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from pathlib import Path
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
from mpirun import in_worlds

FIRST, LAST = 5, 11
SAVED_BY = {3: 1, 2: 3, 1: 2}
"""For each size of a world, the size of the one whose snapshot it loads."""


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


class Training:
    """A Trainer, and the extension that makes its snapshots."""

    def __init__(self, comm: Any, how: str, directory: Path) -> None:
        self.comm, self.how = comm, how
        directory.mkdir(exist_ok=True)
        # The same data everywhere, not shuffled: a snapshot of rank 0 has its own iterator alone.
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
        updater = StandardUpdater(iterator, optimizer)
        self.trainer = Trainer(updater, (100, "iteration"), out=str(directory))
        # As if running: `run` would let the checkpointer delete its files at the end.
        self.trainer._start_at = 0.0
        self.extension = self._the_extension(str(directory))

    def _the_extension(self, directory: str) -> Any:
        if self.how == "checkpointer":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return chainermn.create_multi_node_checkpointer("run", self.comm, path=directory)
        if self.how in ("plain on rank 0", "multi_node_snapshot"):
            plain = extensions.snapshot()
            if self.how == "multi_node_snapshot":
                return chainermn.extensions.multi_node_snapshot(self.comm, plain, [])
            return plain if self.comm.rank == 0 else lambda trainer: None
        writer = snapshot_writers.ThreadWriter() if self.how == "thread" else None
        return snapshot(writer=writer, n_retains=1, autoload=True)

    def begin(self) -> None:
        """Makes the first updates, and snapshots after some of them."""
        if hasattr(self.extension, "initialize"):
            self.extension.initialize(self.trainer)
        for step in range(1, FIRST + 1):
            self.trainer.updater.update()
            if step in (2, 4, FIRST):
                self.extension(self.trainer)
        if self.how == "thread":
            self.extension.finalize()

    def restore(self) -> int:
        """Loads the snapshot; returns after which update it was made."""
        if self.how == "checkpointer":
            self.extension.maybe_load(self.trainer, self.trainer.updater.get_optimizer("main"))
        else:
            self.extension.initialize(self.trainer)
        return self.trainer.updater.iteration

    def end(self) -> dict[str, Any]:
        """Makes the last updates; returns what has come of them."""
        while self.trainer.updater.iteration < LAST:
            self.trainer.updater.update()
        optimizer = self.trainer.updater.get_optimizer("main")
        arrays = [param.array for _, param in sorted(optimizer.target.namedparams())]
        arrays += [optimizer.target.norm.avg_mean, optimizer.target.norm.avg_var]
        return {
            "t": optimizer.t,
            "epoch": optimizer.epoch,
            "iteration": self.trainer.updater.iteration,
            "scale": optimizer._loss_scale,
            "rules": [param.update_rule.t for param in optimizer.target.params()],
            "parameters": hashlib.sha256(b"".join(map(bytes, arrays))).hexdigest(),
        }


def resumed(comm: Any, how: str, directory: Path) -> dict[str, Any]:
    training = Training(comm, how, directory)
    return {"at": training.restore(), **training.end()}


how, place = sys.argv[1], Path(sys.argv[2])


def every(comm: Any) -> dict[str, Any]:
    found = {}
    for how in ("checkpointer", "extension", "thread"):
        directory = place / f"{how} {comm.size}"
        training = Training(comm, how, directory)
        training.begin()
        # Untouched by the snapshots, for comparison.
        uninterrupted = training.end()
        found[how] = {"resumed": resumed(comm, how, directory), "uninterrupted": uninterrupted}
    return found


def of_other_sizes(comm: Any) -> dict[str, Any]:
    directory = place / f"extension {SAVED_BY[comm.size]}"
    return {"resumed of others": resumed(comm, "extension", directory)}


if how == "every":
    in_worlds([1, 2, 3], every)
    in_worlds([1, 2, 3], of_other_sizes)
else:
    Training(chainermn.create_communicator("naive"), how, place).begin()

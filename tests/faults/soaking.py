"""A long training on MPI's ranks, which changes all the time and saves: run by soak.py.

    soaking.py STEPS KILL DIRECTORY...

Learning rate and hooks come and go by the number of the iteration. It goes on from what is in the
directory; rank 1 is killed after the iteration ``KILL``. Of several directories each has a training
of its own, one after the other. Ranks report what they take of memory, descriptors and threads, and
in the end a digest.
"""

from __future__ import annotations

import gc
import hashlib
import math
import os
import signal
import sys
import warnings
from typing import Any

import smorms3_dist

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import models
import numpy as np
from chainer import optimizer_hooks
from chainer.iterators import SerialIterator
from chainer.training import Extension, StandardUpdater, Trainer
from mpirun import report

STEPS, KILL = map(int, sys.argv[1:3])
PERIOD, SAVES, SAMPLES = 37, 20, max(STEPS // 200, 1)
"""Iterations after which hooks are others, a step is saved, and the rank looks at itself."""


class Net(chainer.Chain):
    """Has values beside its parameters, and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(7, 13)
            self.norm = L.BatchNormalization(13)
            self.l2 = L.Linear(13, 3)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> chainer.Variable:
        hidden = F.dropout(F.tanh(self.norm(self.l1(x))), 0.3)
        return F.softmax_cross_entropy(self.l2(hidden), y)


class Looks:
    """A hook of a user's, which sees whole gradients."""

    name = "looks"
    call_for_each_param = False
    timing = "pre"

    def __call__(self, optimizer: Any) -> None:
        assert np.isfinite(optimizer.target.l1.W.grad).all()


HOOKS: list[dict[str, Any]] = [
    {},
    {"decay": optimizer_hooks.WeightDecay(0.001)},
    {"clipping": optimizer_hooks.GradientClipping(0.5)},
    {"decay": optimizer_hooks.WeightDecay(0.001), "lasso": optimizer_hooks.Lasso(0.0001)},
    {"looks": Looks()},
    {"hard": optimizer_hooks.GradientHardClipping(-0.1, 0.1)},
]


class Changes(Extension):
    """Sets what the next iteration is made with."""

    trigger = (1, "iteration")
    priority = 300
    set = 0

    def __call__(self, trainer: Trainer) -> None:
        optimizer = trainer.updater.get_optimizer("main")
        iteration = trainer.updater.iteration
        optimizer.lr = 0.01 + 0.005 * math.sin(iteration)
        wanted = iteration // PERIOD % len(HOOKS)
        rule = optimizer.target.l2.W.update_rule
        if wanted != self.set:
            for name in HOOKS[self.set]:
                optimizer.remove_hook(name)
            for name, hook in HOOKS[wanted].items():
                optimizer.add_hook(hook, name)
            if self.set == 1:
                rule.remove_hook("of the rule")
            if wanted == 1:
                rule.add_hook(optimizer_hooks.WeightDecay(0.01), "of the rule")
        self.set = wanted
        if optimizer.t and iteration % (5 * PERIOD) == 0:
            optimizer.check_sync()
            optimizer.consolidate()


class Sample(Extension):
    """Reports what this rank takes."""

    trigger = (SAMPLES, "iteration")
    priority = -150

    def __init__(self, training: str) -> None:
        self.training = training

    def __call__(self, trainer: Trainer) -> None:
        gc.collect()
        if gc.get_freeze_count() == 0:
            # What is there from the beginning need not be looked at each time.
            gc.freeze()
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[1])
        report(
            comm.rank,
            training=self.training,
            iteration=trainer.updater.iteration,
            memory=pages * os.sysconf("SC_PAGE_SIZE"),
            descriptors=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")),
        )


class Kill(Extension):
    """Kills rank 1, with whatever it is saving."""

    trigger = (1, "iteration")
    priority = -200

    def __call__(self, trainer: Trainer) -> None:
        if trainer.updater.iteration == KILL and comm.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def train(directory: str) -> None:
    """Goes on from what is in a directory, to the last step."""
    np.random.seed(comm.rank)
    data = np.random.RandomState(comm.rank)
    xs, ys = data.standard_normal((50, 7)).astype("f"), data.randint(0, 3, 50).astype("i")
    optimizer = smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm)
    optimizer.setup(Net())
    iterator = SerialIterator(list(zip(xs, ys, strict=True)), 4)
    trainer = Trainer(StandardUpdater(iterator, optimizer), (STEPS, "iteration"), out=os.devnull)
    checkpoint = smorms3_dist.ShardedCheckpoint(
        directory,
        keep_last=3,
        every=(SAVES, "iteration"),
        # In every other job.
        asynchronous=int(os.environ["SMORMS3_RESTART_COUNT"]) % 2 == 0,
    )
    changes = Changes()
    for extension in (checkpoint, changes, Sample(directory), Kill()):
        trainer.extend(extension)
    start = checkpoint.maybe_load(trainer)
    changes(trainer)
    trainer.run()
    groups = optimizer.sharded_model.sharded_groups
    states = [array for group in groups for array in group.states.values()]
    arrays = [*models.arrays(optimizer.target).values(), optimizer.target.norm.avg_mean, *states]
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    report(comm.rank, training=directory, t=optimizer.t, digest=digest, start=start)


warnings.simplefilter("ignore")
comm = chainermn.create_communicator("naive")
for directory in sys.argv[3:]:
    train(directory)

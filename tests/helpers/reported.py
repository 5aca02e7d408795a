"""A short training for the tests of reports, and the page with their keys."""

from __future__ import annotations

from pathlib import Path

from smorms3_dist import create_multi_node_optimizer

import chainer
import models
import numpy as np
from chainer import training
from rank_threads import ThreadCollectives

PAGE = Path(__file__).resolve().parents[2] / "docs/seeing.md"


def trainer_of(comm: ThreadCollectives, out: Path, iterations: int = 6) -> training.Trainer:
    optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm)
    model = models.Model()
    optimizer.setup(model)
    iterator = chainer.iterators.SerialIterator(np.arange(8, dtype="i"), 2)
    updater = training.StandardUpdater(
        iterator, optimizer, loss_func=lambda x: chainer.functions.sum(model.g * model.g)
    )
    return training.Trainer(updater, (iterations, "iteration"), out=str(out / str(comm.rank)))

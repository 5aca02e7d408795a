"""A small training for tests/launch: says each step, saves checkpoints, and can come to harm.

    training.py STEPS [wait | [kill STEP | hang STEP] ...]

``kill`` and ``hang`` befall rank 1 after that step: the first one in the first attempt, the next in
the second. ``wait`` makes steps slow enough to send signals to.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time

import smorms3_dist

# isort: split
import chainer
import chainermn
import models
import numpy as np
from chainer.training import StandardUpdater, Trainer

steps = int(sys.argv[1])
waits = sys.argv[2:] == ["wait"]
harms = list(zip(sys.argv[2::2], map(int, sys.argv[3::2]), strict=False))
attempt = int(os.environ["SMORMS3_RESTART_COUNT"])
harm, at = harms[attempt] if attempt < len(harms) else ("", 0)
comm = chainermn.create_communicator("naive")
model = models.Model()
np.random.seed(comm.rank)


def loss(indices: np.ndarray) -> chainer.Variable:
    scale = np.float32(1 + int(indices[0]) % 5)
    return sum(chainer.functions.sum(param * param) for param in model.params()) * scale


optimizer = smorms3_dist.create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm)
optimizer.setup(model)
iterator = chainer.iterators.SerialIterator(np.arange(12, dtype=np.int32), 2)
updater = StandardUpdater(iterator, optimizer, loss_func=loss)
trainer = Trainer(updater, (steps, "iteration"), out=os.devnull)


@chainer.training.make_extension(trigger=(1, "iteration"), priority=0)
def say(trainer: Trainer) -> None:
    done = trainer.updater.iteration
    if comm.rank == 0:
        print("step", done, flush=True)
    if waits:
        time.sleep(0.05)
    if comm.rank == 1 and done == at:
        if harm == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if harm == "hang":
            time.sleep(3600)


trainer.extend(say)
checkpoint = smorms3_dist.ShardedCheckpoint(every=(3, "iteration"), asynchronous=False)
trainer.extend(checkpoint)
loaded = checkpoint.maybe_load(trainer)
if comm.rank == 0:
    print("from", loaded, "on", comm.size, flush=True)
trainer.run()
if comm.rank == 0:
    arrays = models.arrays(model)
    digest = hashlib.sha256(b"".join(arrays[name].tobytes() for name in sorted(arrays)))
    print("digest", digest.hexdigest(), flush=True)

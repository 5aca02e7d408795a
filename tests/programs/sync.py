"""Makes ranks differ, and writes down what they say of it; then lets them be repaired."""

import hashlib

import smorms3_dist

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
from mpirun import report

comm = chainermn.create_communicator("naive")
model = chainer.Chain(l1=L.Linear(3, 4), norm=L.BatchNormalization(4), l2=L.Linear(4, 2))
optimizer = smorms3_dist.create_multi_node_optimizer(
    chainer.optimizers.SMORMS3(), comm, check_finite="error"
).setup(model)
x = np.random.RandomState(comm.rank).standard_normal((5, 3)).astype("f")
messages = []


def note(function, *args, **options):
    try:
        function(*args, **options)
    except RuntimeError as error:
        messages.append(str(error))


def loss():
    return F.sum(model.l2(model.norm(model.l1(x))))


optimizer.update(loss)
optimizer.update(loss)
if comm.rank == 1:
    model.l1.b.array[0] = 3
note(optimizer.check_sync)
optimizer.check_sync(repair=True)
note(optimizer.check_sync, persistent=True)
optimizer.check_sync(persistent=True, repair=True)
optimizer.check_sync(persistent=True)
values = [model.norm.avg_mean, *(param.array for _, param in sorted(model.namedparams()))]
repaired = hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest()
model.cleargrads()
for param in model.params():
    param.grad = np.ones_like(param.array)
if comm.rank == 1:
    model.l1.W.grad[-1, -1] = np.inf
note(optimizer.update)
report(comm.rank, messages=messages, repaired=repaired)

"""Trainings in which ChainerMN's optimizer hangs, or its ranks silently come to differ."""

import hashlib

import smorms3_dist

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import optimizer_hooks
from mpirun import in_worlds

STEPS = 6


class Net(chainer.Chain):
    """Two heads of which a rank may use one or both; the second is created at its first use."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.body = L.Linear(6, 5)
            self.first = L.Linear(5, 3)
            self.second = L.Linear(None, 3)

    def __call__(self, x, y, second):
        h = F.tanh(self.body(x))
        loss = F.softmax_cross_entropy(self.first(h), y)
        return loss + F.softmax_cross_entropy(self.second(h), y) if second else loss


def lazy_on_one_rank(step, model, optimizer, comm):
    """The last rank is the first to use the second head, and the only one."""
    return step >= 2 and comm.rank == comm.size - 1


def unused_on_one_rank(step, model, optimizer, comm):
    """Rank 0 uses the second head at the first step only; its gradients are None then."""
    return step == 0 or comm.rank != 0


def link_replaced(step, model, optimizer, comm):
    """Another link takes the place, and the names, of one that was there."""
    if step == 3:
        del model.first
        model.add_link("first", L.Linear(5, 3))
    return True


def link_added(step, model, optimizer, comm):
    """A link is added after setup, on each rank with values of its own."""
    if step == 3:
        model.add_link("third", L.Linear(6, 4))
    return True


def noise(step, model, optimizer, comm):
    """Every rank draws noise of its own."""
    if step == 0:
        optimizer.add_hook(optimizer_hooks.GradientNoise(0.3))
    return True


def set_up_again(step, model, optimizer, comm):
    """Values come to differ between the ranks, and the optimizer is set up again."""
    if step == 3:
        del model.second
        model.add_link("second", L.Linear(5, 3))
        optimizer.setup(model)
    return True


def train(hazard, mode, comm):
    np.random.seed(comm.rank)
    model = Net()
    optimizer = smorms3_dist.create_multi_node_optimizer(
        chainer.optimizers.SMORMS3(), comm, zero_fill=False, gradients=mode
    ).setup(model)
    rng = np.random.RandomState(100 + comm.rank)
    moved = True
    for step in range(STEPS):
        second = hazard(step, model, optimizer, comm)
        x = rng.standard_normal((4, 6)).astype("f")
        before = model.first.W.array.copy()
        t = optimizer.t
        optimizer.update(model, x, rng.randint(0, 3, 4).astype("i"), second)
        if optimizer.t > t > 0:
            moved = moved and not np.array_equal(model.first.W.array, before)
    values = b"".join(p.array.tobytes() for _, p in sorted(model.namedparams(False)))
    return {
        "digest": hashlib.sha256(values).hexdigest(),
        "finite": all(np.isfinite(param.array).all() for param in model.params(False)),
        "moved": bool(moved),
        "t": optimizer.t,
    }


HAZARDS = [
    *(lazy_on_one_rank, unused_on_one_rank, link_replaced),
    *(link_added, noise, set_up_again),
]
in_worlds(
    [2, 3],
    lambda comm: {
        f"{hazard.__name__}, {mode}": train(hazard, mode, comm)
        for hazard in HAZARDS
        for mode in ("sharded", "replicated")
    },
)

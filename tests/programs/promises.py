"""Trains the same model by ChainerMN's optimizer and by the sharded one, on MPI ranks."""

import smorms3_dist
from smorms3_dist.collectives import base
from smorms3_dist.collectives.beside import InThread
from smorms3_dist.kernels.dots import lanes_of_blas

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import chainermn.optimizers
import numpy as np
from chainer import optimizer_hooks
from mpirun import in_worlds

CALLS = 8


class NoStream:
    """In the place of CuPy's."""

    def __init__(self, non_blocking=False):
        pass

    def synchronize(self):
        pass


NoStream.null = NoStream()
chainer.cuda.Stream = NoStream

# Some parameters lie in several pieces, others share one.
base.PIECE_BYTES = base.SMALLEST_PIECE_BYTES = 4096


class Net(chainer.Chain):
    """Convolution, batch normalization and layers of odd sizes, one of them created lazily."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            # A bias before a normalization has a gradient of rounding errors and nothing else,
            # which SMORMS3 scales up: no two orders of summation could agree on it.
            self.conv = L.Convolution2D(1, 3, 3, nobias=True)
            self.norm = L.BatchNormalization(3)
            self.l1 = L.Linear(None, 47)
            self.l2 = L.Linear(47, 5)
            self.scale = chainer.Parameter(np.ones(1, "f"))

    def __call__(self, x, y):
        h = F.relu(self.norm(self.conv(x)))
        h = F.tanh(self.l1(h)) * F.broadcast_to(self.scale, (x.shape[0], 47))
        return F.softmax_cross_entropy(self.l2(h), y)


HOOKS = {
    "none": [],
    "WeightDecay": [optimizer_hooks.WeightDecay(0.01)],
    "Lasso": [optimizer_hooks.Lasso(0.001)],
    "GradientHardClipping": [optimizer_hooks.GradientHardClipping(-0.01, 0.02)],
    "GradientClipping": [optimizer_hooks.GradientClipping(0.5)],
    "GradientLARS": [optimizer_hooks.GradientLARS(weight_decay=0.01)],
}
HOOKS["all"] = [hook for hooks in HOOKS.values() for hook in hooks]


def flattened(model):
    return np.concatenate([param.array.reshape(-1) for _, param in sorted(model.namedparams())])


def train(factory, comm, hooks):
    np.random.seed(comm.rank)
    model = Net()
    optimizer = factory(chainer.optimizers.SMORMS3(), comm).setup(model)
    for hook in HOOKS[hooks]:
        optimizer.add_hook(hook)
    rng = np.random.RandomState(100 + comm.rank)
    for _ in range(CALLS):
        x = rng.standard_normal((6, 1, 8, 8)).astype("f")
        y = rng.randint(0, 5, 6).astype("i")
        optimizer.update(model, x, y)
    return model, optimizer


def shared_out(group):
    """Bytes that are sent for a norm of parameters that lie on both of two ranks.

    Lanes of sums, where NumPy's have some; else the smaller parts.
    """
    lanes = lanes_of_blas(group.dtype)
    sent = 0
    for owners in group.segments:
        held = [sum(s.size for rank, s in owners if rank == owner) for owner in (0, 1)]
        sent += 4 * min(held) if lanes is None else 4 * 2 * lanes * (min(held) > 0)
    return sent


def compared(comm, hooks):
    theirs, reference = train(chainermn.create_multi_node_optimizer, comm, hooks)
    names = [name for name, _ in sorted(theirs.namedparams())]
    expected = flattened(theirs)
    results = {}
    for mode in ("sharded", "replicated"):
        ours, optimizer = train(
            lambda actual, c, mode=mode: smorms3_dist.create_multi_node_optimizer(
                actual, c, gradients=mode
            ),
            comm,
            hooks,
        )
        assert optimizer.gradient_mode == mode
        assert optimizer.t == reference.t == CALLS - 1
        assert [name for name, _ in sorted(ours.namedparams())] == names
        mine = flattened(ours)
        (group,) = optimizer.layout.groups
        results[f"{hooks}, {mode}"] = {
            "same_bits": mine.tobytes() == expected.tobytes(),
            "relative": float(np.linalg.norm(mine - expected) / np.linalg.norm(expected)),
            "steps": optimizer.t,
            "sent": dict(optimizer.collectives.bytes_sent),
            "state_bytes": optimizer.state_bytes(),
            "flat_bytes": group.size * 4,
            "shards": [shard.size for shard in group.shards],
            "parameters": mine.size,
            "shared_out": shared_out(group) if comm.size == 2 else 0,
        }
    return results, expected


def late_in_chainermn(actual, comm):
    """ChainerMN's own double buffering, which it gives to a communicator of GPUs alone."""

    def mean_grad_async(model, zero_fill, stream):
        comm.multi_node_mean_grad(model, zero_fill)

    comm._multi_node_mean_grad_async = mean_grad_async
    return chainermn.optimizers._DoubleBufferingOptimizer(actual, comm, True)


def late_compared(comm):
    """Gradients that are applied one update late, and reduced beside the training."""
    results = {}
    for hooks in ("none", "all"):
        theirs, reference = train(late_in_chainermn, comm, hooks)
        expected = flattened(theirs)
        for mode in ("sharded", "replicated"):
            ours, optimizer = train(
                lambda actual, c, mode=mode: smorms3_dist.create_multi_node_optimizer(
                    actual, c, True, gradients=mode
                ),
                comm,
                hooks,
            )
            assert optimizer.gradient_mode == mode
            assert optimizer.t == reference.t == CALLS - 2
            mine = flattened(ours)
            results[f"{hooks}, {mode}"] = {
                "same_bits": mine.tobytes() == expected.tobytes(),
                "relative": float(np.linalg.norm(mine - expected) / np.linalg.norm(expected)),
                "beside": isinstance(optimizer.in_flight._channel, InThread),
            }
    return results


def all_compared(comm):
    """Each hook by itself on few ranks; on more of them none, and all together."""
    results, unhooked = compared(comm, "none")
    for hooks in HOOKS if comm.size <= 3 else ["all"]:
        if hooks != "none":
            hooked, values = compared(comm, hooks)
            results |= hooked
            assert not np.array_equal(values, unhooked), f"{hooks} has done nothing"
    return {"steps": results, "late": late_compared(comm)}


in_worlds([1, 2, 3, 4, 5], all_compared)

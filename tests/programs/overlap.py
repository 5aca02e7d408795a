"""Trains on MPI ranks with and without overlap, of gradients and of parameters.

Large layers, a caught failure, a refused step.
"""

import smorms3_dist
from smorms3_dist import create_multi_node_optimizer

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from mpirun import in_worlds


class Net(chainer.Chain):
    """Layers of several pieces and small ones, one of which not all ranks use."""

    def __init__(self):
        super().__init__()
        rng = np.random.RandomState(0)
        with self.init_scope():
            self.a = L.Linear(31, 800)
            self.b = L.Linear(800, 700)
            self.c = L.Linear(700, 7)
            self.d = L.Linear(7, 3)
            self.rest = chainer.ChainList(*(L.Linear(3, 2) for _ in range(20)))
        for _, param in sorted(self.namedparams()):
            param.array[...] = rng.standard_normal(param.shape) * 0.1
        self.fails = False

    def loss(self, rank, step):
        class Here(chainer.FunctionNode):
            def forward(_, inputs):
                return (inputs[0].copy(),)

            def backward(_, indexes, grads):
                if self.fails:
                    raise FloatingPointError("half-way")
                return grads

        x = np.random.RandomState([rank, step]).standard_normal((4, 31)).astype("f")
        (h,) = Here().apply((self.a(x),))
        h = F.tanh(self.c(F.tanh(self.b(F.tanh(h)))))
        loss = F.sum(F.square(h))
        if rank != 1:
            loss += F.sum(F.square(self.d(h)))
        return loss


def train(comm, **options):
    model = Net()
    optimizer = create_multi_node_optimizer(chainer.optimizers.SMORMS3(), comm, **options)
    optimizer.setup(model)
    states = []
    for step in range(10):
        if comm.rank == comm.size - 1 and step == 4:
            model.fails = True
            try:
                optimizer.update(model.loss, comm.rank, 99)
            except FloatingPointError:
                states.append("caught")
            model.fails = False
        if comm.size > 1 and step == 8:
            optimizer.lr *= 1 + comm.rank
            try:
                optimizer.update(model.loss, comm.rank, step)
            except RuntimeError:
                states.append("refused")
            optimizer.lr /= 1 + comm.rank
        optimizer.update(model.loss, comm.rank, step)
        states.append(optimizer._overlap.state[:12])
    flat = [param.array.reshape(-1) for _, param in sorted(model.namedparams())]
    sent = optimizer.collectives.bytes_sent["reduce_scatter"]
    return np.concatenate(flat), states, sent


def body(comm):
    late, _, sent_late = train(comm)
    early, states, sent = train(comm, overlap=True)
    beside, _, _ = train(comm, overlap=True, overlap_gather=True)
    narrow, narrow_beside = (
        train(comm, gather_dtype="bfloat16", overlap_gather=gather)[0] for gather in (False, True)
    )
    rank_zeros = comm.bcast_obj(early if comm.rank == 0 else None)
    return {
        "same_bits": early.tobytes() == late.tobytes(),
        "same_bits_beside_the_forward_pass": beside.tobytes() == late.tobytes(),
        "same_bits_in_a_narrow_dtype": narrow.tobytes() == narrow_beside.tobytes(),
        "alike": early.tobytes() == rank_zeros.tobytes(),
        "states": states,
        "sent": round(9 * sent / sent_late, 6),
    }


assert smorms3_dist.__version__
in_worlds([2], body)

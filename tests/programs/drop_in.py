"""Scripts for Chainer's and ChainerMN's optimizers, also run with sharded ones."""

import functools
import hashlib
from unittest.mock import MagicMock

import smorms3_dist

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
from chainer import initializers
from mpirun import in_worlds

STEPS, BATCH, FEATURES = 50, 32, 10
START = np.random.RandomState(6).standard_normal((2, FEATURES))


# In the place of chainer.optimizers.SMORMS3


def sharded(comm, **hyperparameters):
    return smorms3_dist.create_multi_node_optimizer(
        chainer.optimizers.SMORMS3(**hyperparameters), comm, step_after_broadcast=True
    )


def samples(rng, dtype, count=BATCH):
    """Points of a cube, and on which side of a plane they lie."""
    x = rng.uniform(-1, 1, (count, FEATURES))
    plane = np.random.RandomState(5).uniform(-1, 1, FEATURES)
    return x.astype(dtype), (x @ plane > 0.1).astype(np.int32)


def learned(make, dtype, fp32_update, seed):
    """A linear model that has learned to tell the sides."""
    # The weights are created at the first step, the bias is there from the beginning.
    model = L.Linear(
        None,
        2,
        initialW=initializers.Constant(START, dtype),
        initial_bias=initializers.Zero(dtype),
    )
    optimizer = make(lr=0.1)
    if fp32_update:
        optimizer.use_fp32_update()
    optimizer.setup(model)
    rng = np.random.RandomState(seed)
    for _ in range(STEPS):
        x, y = samples(rng, dtype)
        optimizer.update(lambda x, y: F.softmax_cross_entropy(model(x), y), x, y)
    assert optimizer.t == STEPS
    assert {param.dtype for param in model.params()} == {np.dtype(dtype)}
    return model


def bits(model):
    parts = [param.array.tobytes() for _, param in sorted(model.namedparams())]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def accuracy(model, dtype):
    """Accuracies before and after learning, for samples that no rank has seen."""
    x, y = samples(np.random.RandomState(99), dtype, count=500)
    return [float(F.accuracy(logits, y).array) for logits in (x @ START.T.astype(dtype), model(x))]


def linear(comm):
    results = {}
    make = functools.partial(sharded, comm)
    for dtype in ("float16", "float32", "float64"):
        for fp32_update in (True, False):
            theirs = learned(chainer.optimizers.SMORMS3, dtype, fp32_update, seed=7)
            ours = learned(make, dtype, fp32_update, seed=7)
            of_all = learned(make, dtype, fp32_update, seed=7 + comm.rank)
            results[f"{dtype} {'in fp32' if fp32_update else 'in its own dtype'}"] = {
                "same_bits_as_chainers": bits(ours) == bits(theirs),
                "accuracy": accuracy(of_all, dtype),
                "same_bits_on_all_ranks": len(set(comm.mpi_comm.allgather(bits(of_all)))) == 1,
            }
    return results


# In the place of chainermn.create_multi_node_optimizer


def grow(model, name, number):
    with model.init_scope():
        setattr(model, name, L.Linear(2, 3, nobias=True, initialW=number))


def rank_dependent(names, rank):
    """A chain of links whose values differ between links and between ranks."""
    model = chainer.Chain()
    for start, name in enumerate(names):
        grow(model, name, rank + start)
    model.cleargrads()
    return model


def set_gradients(model, rank):
    for start, (_, param) in enumerate(sorted(model.namedparams())):
        param.grad = np.full(param.shape, rank + start, param.dtype)


def with_mocked_rules(factory, comm, growing):
    """What can be seen after each update, if rules only note that they are called."""
    actual = chainer.GradientMethod()
    actual.create_update_rule = MagicMock
    model = rank_dependent("ab", comm.rank)
    optimizer = factory(actual, comm)
    moments = []

    def look():
        params = dict(sorted(model.namedparams()))
        calls = {name: p.update_rule.update.call_args_list for name, p in params.items()}
        moments.append(
            {
                "t": actual.t,
                "values": {name: np.unique(p.array).tolist() for name, p in params.items()},
                "calls_with_the_parameter": {
                    name: [
                        len(args) == 1 and args[0] is params[name] and not keywords
                        for args, keywords in calls[name]
                    ]
                    for name in params
                },
                "gradients": {name: np.unique(p.grad).tolist() for name, p in params.items()}
                if actual.t
                else {},
            }
        )

    assert optimizer.setup(model) is optimizer
    optimizer.update()
    look()
    if growing:
        grow(model, "c", comm.rank + 2)
        model.cleargrads()
        optimizer.setup(model)
        optimizer.update()
        look()
    set_gradients(model, comm.rank)
    optimizer.update()
    look()
    return moments


def trained(factory, comm):
    """Trains, adds a link, sets up again and trains on."""
    model = rank_dependent("ab", comm.rank)
    optimizer = factory(chainer.optimizers.SMORMS3(lr=0.1), comm).setup(model)
    for _ in range(3):
        set_gradients(model, comm.rank)
        optimizer.update()
    grow(model, "c", comm.rank + 2)
    optimizer.setup(model)
    for _ in range(3):
        set_gradients(model, comm.rank)
        optimizer.update()
    return {"t": optimizer.t, "bits": bits(model)}


FACTORIES = {
    "chainermn": chainermn.create_multi_node_optimizer,
    "smorms3_dist": smorms3_dist.create_multi_node_optimizer,
}


def everything(comm):
    def by_each(script, *arguments):
        return {name: script(factory, comm, *arguments) for name, factory in FACTORIES.items()}

    return {
        "linear": linear(comm),
        "mocked": by_each(with_mocked_rules, False),
        "growing": by_each(with_mocked_rules, True),
        "trained": by_each(trained),
    }


in_worlds([1, 2], everything)

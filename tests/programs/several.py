"""Two optimizers over one communicator, and a model that communicates itself, on MPI ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import smorms3_dist

import chainer
import chainer.functions as F
import chainer.links as L
import chainermn
import numpy as np
from chainermn.links import MultiNodeBatchNormalization
from mpirun import in_worlds

UPDATES = 15
Factory = Callable[..., Any]


class Normalized(chainer.Chain):
    """Batch normalization over the batches of all ranks, between layers of odd sizes."""

    def __init__(self, comm: Any) -> None:
        super().__init__()
        with self.init_scope():
            # A bias before a normalization has a gradient of rounding errors and nothing else.
            self.conv = L.Convolution2D(1, 3, 3, nobias=True)
            self.norm = MultiNodeBatchNormalization(3, comm)
            self.out = L.Linear(None, 5)

    def __call__(self, x: np.ndarray, y: np.ndarray) -> chainer.Variable:
        return F.softmax_cross_entropy(self.out(F.relu(self.norm(self.conv(x)))), y)


def compared(ours: chainer.Link, theirs: chainer.Link) -> dict[str, Any]:
    mine, expected = (
        np.concatenate([param.array.reshape(-1) for _, param in sorted(link.namedparams())])
        for link in (ours, theirs)
    )
    return {
        "same_bits": mine.tobytes() == expected.tobytes(),
        "relative": float(np.linalg.norm(mine - expected) / np.linalg.norm(expected)),
    }


def train_normalized(factory: Factory, comm: Any) -> tuple[Any, chainer.Link]:
    np.random.seed(comm.rank)
    model = Normalized(comm)
    optimizer = factory(chainer.optimizers.SMORMS3(lr=0.01), comm).setup(model)
    rng = np.random.RandomState(100 + comm.rank)
    for _ in range(UPDATES):
        x = rng.standard_normal((4, 1, 6, 6)).astype("f")
        optimizer.update(model, x, rng.randint(0, 5, 4).astype("i"))
    return optimizer, model


def normalization(comm: Any) -> dict[str, Any]:
    reference, theirs = train_normalized(chainermn.create_multi_node_optimizer, comm)
    results = {}
    for mode in ("sharded", "replicated"):
        optimizer, ours = train_normalized(
            lambda actual, c, mode=mode: smorms3_dist.create_multi_node_optimizer(
                actual, c, gradients=mode
            ),
            comm,
        )
        assert optimizer.t == reference.t == UPDATES - 1
        results[mode] = {
            **compared(ours, theirs),
            "same_averages": ours.norm.avg_mean.tobytes() == theirs.norm.avg_mean.tobytes()
            and ours.norm.avg_var.tobytes() == theirs.norm.avg_var.tobytes(),
        }
    return results


def perceptron(sizes: tuple[int, ...]) -> chainer.Sequential:
    layers: list[Any] = []
    for n_in, n_out in itertools.pairwise(sizes):
        layers += [L.Linear(n_in, n_out), F.tanh]
    return chainer.Sequential(*layers[:-1])


def train_two(factory: Factory, comm: Any) -> list[Any]:
    """A large model by SMORMS3 and a small one by Adam, each with updates of its own."""
    np.random.seed(comm.rank)
    large, small = perceptron((7, 61, 43, 3)), perceptron((3, 5, 2))
    first = factory(chainer.optimizers.SMORMS3(lr=0.01), comm).setup(large)
    second = factory(chainer.optimizers.Adam(), comm).setup(small)
    second.add_hook(chainer.optimizer_hooks.WeightDecay(0.01))
    rng = np.random.RandomState(100 + comm.rank)
    for step in range(UPDATES):
        x = rng.standard_normal((6, 7)).astype("f")
        y = rng.randint(0, 2, 6).astype("i")
        if step % 3:
            first.update(lambda x=x, y=y: F.softmax_cross_entropy(small(large(x)), y))
        second.update(lambda x=x, y=y: F.softmax_cross_entropy(small(large(x)), y))
    return [first, second]


def two_optimizers(comm: Any) -> list[dict[str, Any]]:
    theirs = train_two(chainermn.create_multi_node_optimizer, comm)
    ours = train_two(smorms3_dist.create_multi_node_optimizer, comm)
    results = []
    for mine, reference, states in zip(ours, theirs, (12, 8), strict=True):
        parameters = sum(param.size for param in mine.target.params())
        results.append(
            {
                **compared(mine.target, reference.target),
                "counts": [mine.t, reference.t],
                "state_bytes": mine.state_bytes(),
                "expected_state_bytes": states * parameters,
            }
        )
    return results


def in_another_order(comm: Any) -> str:
    """What a rank is told that updates two optimizers in the order of no other rank."""
    optimizers = train_two(smorms3_dist.create_multi_node_optimizer, comm)
    for optimizer in reversed(optimizers) if comm.rank == 1 else optimizers:
        try:
            optimizer.update()
        except RuntimeError as error:
            return str(error)
    return "nothing"


# MultiNodeBatchNormalization says at each construction that its interface may change.
chainer.disable_experimental_feature_warning = True
in_worlds(
    [1, 2, 3],
    lambda comm: {
        "normalization": normalization(comm),
        "two": two_optimizers(comm),
        "told": in_another_order(comm),
    },
)

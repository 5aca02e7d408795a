"""Models whose backward passes differ, and trainings of them with and without overlap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from models import arrays, assert_alike, assert_same_bits, on_ranks
from rank_threads import ThreadSideChannel

STEPS = 6

Body = Callable[[Any, int], Any]


def batch(rank: int, step: int, *shape: int) -> np.ndarray:
    return np.random.RandomState([rank, step]).standard_normal(shape).astype(np.float32)


class Net(chainer.Chain):
    """A model with initial values that depend on its parameters' names and shapes alone."""

    def __init__(self, **links: chainer.Link) -> None:
        super().__init__()
        with self.init_scope():
            for name, link in links.items():
                setattr(self, name, link)

    def fill(self) -> Net:
        rng = np.random.RandomState(1)
        for _, param in sorted(self.namedparams(include_uninit=False)):
            param.array[...] = rng.standard_normal(param.shape) * 0.3
        return self

    def loss(self, rank: int, step: int) -> Any:
        raise NotImplementedError


class Mlp(Net):
    def __init__(self) -> None:
        super().__init__(a=L.Linear(13, 37), b=L.Linear(37, 29), c=L.Linear(29, 3))
        self.fill()

    def loss(self, rank: int, step: int) -> Any:
        h = F.tanh(self.b(F.tanh(self.a(batch(rank, step, 7, 13)))))
        return F.sum(F.square(self.c(h)))


class ConvNet(Net):
    def __init__(self) -> None:
        super().__init__(a=L.Convolution2D(1, 4, 3), b=L.BatchNormalization(4), c=L.Linear(None, 3))

    def loss(self, rank: int, step: int) -> Any:
        h = F.relu(self.b(self.a(batch(rank, step, 5, 1, 6, 6))))
        fresh = self.c.W.array is None
        y = self.c(F.max_pooling_2d(h, 2))
        if fresh:
            self.fill()
        return F.sum(F.square(y))


class Rnn(Net):
    """Weights that are used at each step; their number differs by rank."""

    def __init__(self) -> None:
        super().__init__(lstm=L.StatelessLSTM(5, 6), out=L.Linear(6, 2), unused=L.Linear(3, 3))
        self.fill()

    def loss(self, rank: int, step: int) -> Any:
        c = h = None
        for turn in range(2 + (rank + step) % 3):
            c, h = self.lstm(c, h, batch(rank, step * 10 + turn, 4, 5))
        return F.sum(F.square(self.out(h)))


class Dynamic(Net):
    """Layers in an order that differs by rank and step; some are left out."""

    def __init__(self) -> None:
        super().__init__(**{name: L.Linear(9, 9) for name in "abcde"})
        self.fill()

    def loss(self, rank: int, step: int) -> Any:
        order = np.random.RandomState([rank, step, 7]).permutation(list("abcde"))
        h = batch(rank, step, 4, 9)
        for name in order[: 1 + (rank + 2 * step) % 5]:
            h = F.tanh(self[name](h))
        return F.sum(F.square(h)) + F.sum(self.a.W * self.a.W)


class Mixed(Net):
    """float16 with masters in float32, beside parameters of float32."""

    def __init__(self) -> None:
        with chainer.using_config("dtype", np.float16):
            super().__init__(a=L.Linear(13, 17), b=L.Linear(17, 5))
        with self.init_scope():
            self.scale = L.Scale(1, (5,))
        self.fill()

    def loss(self, rank: int, step: int) -> Any:
        h = F.tanh(self.a(batch(rank, step, 7, 13).astype(np.float16)))
        return F.sum(F.square(self.scale(F.cast(self.b(h), np.float32))))


class Penalized(Net):
    """A loss with a gradient in it."""

    def __init__(self) -> None:
        super().__init__(a=L.Linear(4, 5), b=L.Linear(5, 1))
        self.fill()

    def loss(self, rank: int, step: int) -> Any:
        x = chainer.Variable(batch(rank, step, 6, 4))
        y = self.b(F.tanh(self.a(x)))
        (slope,) = chainer.grad([y], [x], enable_double_backprop=True)
        return F.sum(F.square(slope)) + F.sum(y)


MODELS = [Mlp, ConvNet, Rnn, Dynamic, Mixed, Penalized]


def train(optimizer: Any, rank: int, steps: int = STEPS) -> None:
    for step in range(steps):
        optimizer.update(optimizer.target.loss, rank, step)


def orders_of(optimizer: Any) -> list[Any]:
    """The orders of the reductions that have begun during a backward pass."""
    channel = optimizer._overlap._channel
    return channel.orders if isinstance(channel, ThreadSideChannel) else []


def reductions(optimizer: Any) -> int:
    """How many these are."""
    return len(orders_of(optimizer))


def same_bits(
    world: int, body: Body, make_model: Callable[[], chainer.Link] = Mlp, **options: Any
) -> tuple[list[Any], list[Any]]:
    """Runs a body with overlap and without; fails unless models are the same bit for bit.

    Returns what the bodies returned with overlap, by rank, and the optimizers.
    """

    def run(optimizer: Any, rank: int) -> tuple[Any, Any]:
        return body(optimizer, rank), optimizer

    late = on_ranks(world, run, make_model=make_model, overlap=False, **options)
    early = on_ranks(world, run, make_model=make_model, overlap=True, **options)
    for (_, with_overlap), (_, without) in zip(early, late, strict=True):
        assert_same_bits(with_overlap.target, without.target)
    assert_alike([optimizer.target for _, optimizer in early])
    assert optimizer_has_moved(early[0][1], make_model)
    return [result for result, _ in early], [optimizer for _, optimizer in early]


def optimizer_has_moved(optimizer: Any, make_model: Callable[[], chainer.Link]) -> bool:
    before = arrays(make_model())
    return any(np.any(array != before.get(n, 0)) for n, array in arrays(optimizer.target).items())
